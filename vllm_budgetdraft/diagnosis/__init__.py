"""What a user asks before and after trouble: ``budgetdraft env`` and ``check``."""
