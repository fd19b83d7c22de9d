"""What vLLM makes of ``method="budgetdraft"``: a config, a runner, a speculator."""

import inspect
from typing import Any

from vllm_budgetdraft.vllm_integration.patching import Function, is_ours

#: Keys of a speculative config that EngineArgs also takes as arguments of their own.
SEPARATE_ARGUMENTS = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}


def make_our_config(original: Function) -> Function:
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


def support_runner_v2(original: Function) -> Function:
    def _get_v2_model_runner_unsupported_features(self: Any) -> list[str]:
        unsupported = original(self)
        if not is_ours(self.speculative_config):
            return unsupported
        from vllm_budgetdraft.vllm_integration.speculative_config import only_on_v1

        method = "speculative method 'custom_class'"
        others = [feature for feature in unsupported if feature != method]
        return others + only_on_v1(self)

    return _get_v2_model_runner_unsupported_features


def make_our_speculator(original: Function) -> Function:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not is_ours(vllm_config.speculative_config):
            return original(vllm_config, device, req_states)
        from vllm_budgetdraft.vllm_integration.v2.building import make_speculator

        return make_speculator(vllm_config, device, req_states)

    return init_speculator
