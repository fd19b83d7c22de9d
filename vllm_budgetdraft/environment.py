"""Every environment variable of this package, read on access.

They start with BUDGETDRAFT_: vLLM warns about VLLM_* variables that it does not know.
"""

import os


def check_invariants() -> bool:
    """BUDGETDRAFT_CHECK_INVARIANTS=1: check a request's draft cache before each draft.

    For finding bugs; it waits for the device at every step.
    """
    return os.environ.get("BUDGETDRAFT_CHECK_INVARIANTS", "0") == "1"


def skip_version_check() -> bool:
    """BUDGETDRAFT_SKIP_VERSION_CHECK=1: run on a vLLM outside the supported range."""
    return os.environ.get("BUDGETDRAFT_SKIP_VERSION_CHECK", "0") == "1"


def cache_folder() -> str | None:
    """BUDGETDRAFT_CACHE=FOLDER: where `budgetdraft fetch` makes models.

    Without it that is $XDG_CACHE_HOME/budgetdraft, and else ~/.cache/budgetdraft.
    """
    return os.environ.get("BUDGETDRAFT_CACHE") or None
