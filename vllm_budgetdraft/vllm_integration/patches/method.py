"""``EngineArgs.create_speculative_config`` learns the method "budgetdraft"."""

import inspect
from typing import Any

from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method

#: Keys of a speculative config that EngineArgs also takes as arguments of their own.
SEPARATE_ARGUMENTS = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}


def apply() -> None:
    """Symptom: vLLM refuses ``method="budgetdraft"``.

    Reason: its methods are a closed list, and its config forbids unknown keys. The
    wrapper turns ours into the method "custom_class", which vLLM has for proposers
    from outside. Remove when vLLM lets a plugin register a speculative method.
    """
    from vllm.engine.arg_utils import EngineArgs

    wrap_method(EngineArgs, "create_speculative_config", _wrap)


def _wrap(original: Function) -> Function:
    signature = inspect.signature(original)

    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = _requested(self)
        if settings.pop("method", None) != "budgetdraft":
            return original(self, *args, **kwargs)
        from vllm_budgetdraft.vllm_integration.speculative_config import make_config

        arguments = signature.bind(self, *args, **kwargs).arguments
        return make_config(
            settings,
            arguments["target_model_config"],
            arguments["target_parallel_config"],
        )

    return create_speculative_config


def _requested(engine_args: Any) -> dict[str, Any]:
    """What the user asked for, in a dict of its own: vLLM reuses its EngineArgs."""
    requested = engine_args.speculative_config or {}
    settings = {key.replace("-", "_"): value for key, value in requested.items()}
    for argument, key in SEPARATE_ARGUMENTS.items():
        value = getattr(engine_args, argument, None)
        if value is not None:
            settings.setdefault(key, value)
    return settings
