"""Which vLLM this package runs on."""

import re

from vllm_budgetdraft.environment import skip_version_check
from vllm_budgetdraft.errors import UnsupportedVllmError

OLDEST, NEWEST = (0, 27), (0, 33)
#: Whose model runner V2 has the interface that ``v2`` implements.
OLDEST_WITH_RUNNER_V2 = (0, 32)
#: In older versions a "custom_class" is never scheduled ahead.
OLDEST_THAT_SCHEDULES_AHEAD = (0, 33)


def check_vllm_version(version: str) -> None:
    """Raises UnsupportedVllmError for a vLLM outside the supported range."""
    if (parsed := _parsed(version)) and OLDEST <= parsed <= NEWEST:
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


def is_at_least(version: str, oldest: tuple[int, int]) -> bool:
    """Whether a vLLM is as new; one of an unreadable version is not."""
    parsed = _parsed(version)
    return parsed is not None and parsed >= oldest


def supports_runner_v2(version: str) -> bool:
    """Whether drafting works in the model runner V2 of a vLLM of this version."""
    return is_at_least(version, OLDEST_WITH_RUNNER_V2)


def schedules_custom_class_ahead(version: str) -> bool:
    """Whether a vLLM of this version schedules "custom_class" methods ahead."""
    return is_at_least(version, OLDEST_THAT_SCHEDULES_AHEAD)


def _parsed(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None
