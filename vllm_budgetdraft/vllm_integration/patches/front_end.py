"""The processes that users talk to: requests, calls, and what metrics show."""

import inspect
from typing import Any

from vllm_budgetdraft.config import parse_request_settings
from vllm_budgetdraft.errors import ConfigurationError, UnsupportedVllmError
from vllm_budgetdraft.vllm_integration.patching import Function, is_ours

#: Weights are discarded, and reloaded for the target alone.
DISCARDS_WEIGHTS = 2


def check_request(original: Function) -> Function:
    from vllm.exceptions import VLLMClientError

    class BadRequestError(ConfigurationError, VLLMClientError):
        """What a client asks for and may not, which vLLM answers with 400."""

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not is_ours(speculative_config):
            original(self, speculative_config)
            return
        try:
            parse_request_settings(self.extra_args, speculative_config.settings)
        except ConfigurationError as error:
            raise BadRequestError(str(error)) from None

    return _validate_spec_decode


def refuse_deep_sleep(original: Function) -> Function:
    signature = inspect.signature(original)

    def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        level = bound.arguments["level"]
        ours = is_ours(self.vllm_config.speculative_config)
        if ours and level >= DISCARDS_WEIGHTS:
            raise UnsupportedVllmError(
                f"sleep level {level} discards the drafter's weights, which vLLM "
                "would not reload; use level 1, which keeps them in host memory"
            )
        return original(self, *args, **kwargs)

    return sleep


def show_statistics(original: Function) -> Function:
    def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if is_ours(vllm_config.speculative_config):
            from vllm_budgetdraft.vllm_integration.metrics.prometheus import (
                BudgetDraftStatLogger,
            )

            # Before vLLM's, which hands what it logs to no other.
            ours = BudgetDraftStatLogger(vllm_config, self.engine_indexes)
            self.stat_loggers.insert(0, ours)

    return initialise
