"""The processes that users talk to: what a request or a call asks of drafting."""

import inspect
from typing import Any

from vllm_budgetdraft.config import parse_request_settings
from vllm_budgetdraft.errors import ConfigurationError, UnsupportedVllmError
from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method

#: Weights are discarded, and reloaded for the target alone.
DISCARDS_WEIGHTS = 2


def apply(config_class: Any) -> None:
    """Patches the classes where requests and calls come in.

    Args:
        config_class: of the speculative configs that are ours.
    """
    from vllm import exceptions
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    # Older vLLM answers any ValueError with 400; newer ones only their own.
    client_error: Any = getattr(exceptions, "VLLMClientError", ValueError)

    class BadRequestError(ConfigurationError, client_error):
        """What a client asks for and may not."""

    def check_request(original: Function) -> Function:
        """Symptom: a wrong ``kv_budget`` in ``extra_args`` is found in the worker.

        Reason: vLLM hands these on unread; an error there cannot reach the client. From
        here it is a 400. Remove when vLLM lets a plugin validate requests.
        """

        def verify(self: Any, *args: Any, **kwargs: Any) -> None:
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, config_class):
                    try:
                        parse_request_settings(self.extra_args, argument.settings)
                    except ConfigurationError as error:
                        raise BadRequestError(str(error)) from None
            original(self, *args, **kwargs)

        return verify

    def allow_every_processor(original: Function) -> Function:
        """Symptom: min_p and logit_bias are refused.

        Reason and removal: see ``rejection_sampler._apply_logit_bias``.
        """

        def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
            if not isinstance(speculative_config, config_class):
                original(self, speculative_config)

        return _validate_spec_decode

    def refuse_deep_sleep(original: Function) -> Function:
        """Symptom: after sleep level 2, the drafter's weights are garbage.

        Reason: vLLM discards all weights, and on waking reloads the target's. Remove
        when it calls a "custom_class" proposer to reload its own.
        """
        signature = inspect.signature(original)

        def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            level = bound.arguments["level"]
            ours = isinstance(self.vllm_config.speculative_config, config_class)
            if ours and level >= DISCARDS_WEIGHTS:
                raise UnsupportedVllmError(
                    f"sleep level {level} discards the drafter's weights, which vLLM "
                    "would not reload; use level 1, which keeps them in host memory"
                )
            return original(self, *args, **kwargs)

        return sleep

    wrap_method(SamplingParams, "verify", check_request)
    wrap_method(SamplingParams, "_validate_spec_decode", allow_every_processor)
    wrap_method(LLMEngine, "sleep", refuse_deep_sleep)
    wrap_method(AsyncLLM, "sleep", refuse_deep_sleep)
