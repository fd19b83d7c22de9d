"""``budgetdraft demo``: vLLM with and without BudgetDraft on pages of a novel."""
