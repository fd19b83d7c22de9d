"""The engine's core: its scheduler."""

from typing import Any

from vllm_budgetdraft.vllm_integration.patching import Function, is_ours, specialise


def make_our_scheduler(original: Function) -> Function:
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_ours(self.vllm_config.speculative_config):
            from vllm_budgetdraft.vllm_integration.scheduler import DraftScheduler

            specialise(self, DraftScheduler)
            self.begin_drafting()

    return initialise
