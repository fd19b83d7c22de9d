"""Every environment variable of this package, read on access.

They start with BUDGETDRAFT_: vLLM warns about VLLM_* variables that it does not know.
"""

import os


def skip_version_check() -> bool:
    """BUDGETDRAFT_SKIP_VERSION_CHECK=1: run on a vLLM outside the supported range."""
    return os.environ.get("BUDGETDRAFT_SKIP_VERSION_CHECK", "0") == "1"
