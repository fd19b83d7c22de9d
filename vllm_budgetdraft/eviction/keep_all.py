"""No eviction: the full-KV baseline."""

from torch import Tensor

from vllm_budgetdraft.eviction.base import EvictionPolicy, PromptStates


class KeepAll(EvictionPolicy):
    """Keeps every position, whatever the budget."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        return states.all_positions()

    def protected_tokens(self, budget: int) -> int:
        return 0
