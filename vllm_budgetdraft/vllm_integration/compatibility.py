"""Which vLLM this package runs on."""

import re

from vllm_budgetdraft.environment import skip_version_check
from vllm_budgetdraft.errors import UnsupportedVllmError

OLDEST, NEWEST = (0, 25), (0, 33)


def check_vllm_version(version: str) -> None:
    """Raises UnsupportedVllmError for a vLLM outside the supported range."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        return
    if skip_version_check():
        return
    from vllm_budgetdraft import __version__

    supported = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
    raise UnsupportedVllmError(
        f"vLLM {version} is outside what vllm-budgetdraft {__version__} supports, "
        f"{supported}; install a supported vLLM, or set "
        "BUDGETDRAFT_SKIP_VERSION_CHECK=1 to try anyway"
    )
