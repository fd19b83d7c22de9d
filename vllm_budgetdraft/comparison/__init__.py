"""vLLM's methods on the same prompts: ``budgetdraft evaluate`` and ``demo``."""
