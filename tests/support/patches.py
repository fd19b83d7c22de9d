"""vLLM's own functions and configs, for tests of what we change."""

import importlib
from typing import Any

from tests.support.engines import DRAFTER, ENGINE_ARGS
from vllm_budgetdraft.vllm_integration.patches.table import PATCHES, apply

SETTINGS = {
    "method": "budgetdraft",
    "model": DRAFTER,
    "num_speculative_tokens": 4,
    "kv_budget": 64,
    "recent_window": 64,
}


def make_engine_args() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**ENGINE_ARGS, speculative_config=SETTINGS)


def make_patched_config() -> Any:
    """vLLM's config of an engine of ours, in a process as its engine's would be."""
    from vllm.platforms import current_platform

    found = make_engine_args().create_engine_config()
    register = getattr(current_platform, "register_triton_kernel_overrides", None)
    if register is not None:  # in older vLLM they are there at once
        register()
    apply("config")
    apply("worker")
    return found


def theirs(name: str) -> Any:
    """A function as vLLM has it, by its name in the table."""
    (patch,) = [each for each in PATCHES if each.target.endswith(f":{name}")]
    found: Any = importlib.import_module(patch.target.split(":")[0])
    for part in name.split("."):
        found = getattr(found, part)
    return found.__wrapped__
