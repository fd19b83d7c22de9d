"""``python -m vllm_budgetdraft`` is the command ``budgetdraft``."""

from vllm_budgetdraft.cli import main

main()
