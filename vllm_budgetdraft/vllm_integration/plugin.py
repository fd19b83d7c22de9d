"""vLLM's way in: the ``vllm.general_plugins`` entry point."""

import logging


def register() -> None:
    """Makes ``method="budgetdraft"`` known. vLLM calls this in each of its processes.

    Never raises: an error here would take vLLM down for users of other methods. What
    is wrong with a budgetdraft configuration is said when one is created.
    """
    try:
        from vllm_budgetdraft.vllm_integration.patches import table

        table.apply("plugin")
    except Exception:
        logging.getLogger("vllm.budgetdraft").exception(
            "vllm-budgetdraft cannot hook into this vLLM; the method 'budgetdraft' is "
            "not available"
        )
