"""No eviction: the full-KV baseline."""

from types import ModuleType

from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.eviction.base import all_positions


class KeepAll:
    """Keeps every position, whatever the budget."""

    observation_tokens = 0

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        pass

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        return all_positions(keys)

    def protected_tokens(self, budget: int) -> int:
        return 0
