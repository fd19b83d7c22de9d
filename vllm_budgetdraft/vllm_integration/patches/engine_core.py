"""The engine's core: its scheduler, and calls to the engine as a whole."""

from typing import Any

from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.vllm_integration.patching import Function, is_ours, specialise

#: Weights are discarded, and reloaded for the target alone.
DISCARDS_WEIGHTS = 2


def refuse_deep_sleep(original: Function) -> Function:
    def sleep(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        ours = is_ours(self.vllm_config.speculative_config)
        if ours and level >= DISCARDS_WEIGHTS:
            raise UnsupportedVllmError(
                f"sleep level {level} discards the drafter's weights, which vLLM "
                "would not reload; use level 1, which keeps them in host memory"
            )
        return original(self, level, *args, **kwargs)

    return sleep


def make_our_scheduler(original: Function) -> Function:
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_ours(self.vllm_config.speculative_config):
            from vllm_budgetdraft.vllm_integration.scheduler import DraftScheduler

            specialise(self, DraftScheduler)
            self.begin_drafting()

    return initialise
