"""Policies that a user might bring."""

from types import ModuleType

import torch
from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings


class EverySecond:
    """Keeps the budget's share of even positions, the latest of them."""

    observation_tokens = 0

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        self.settings, self.operations = settings, operations

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        even = torch.arange(0, keys.shape[-2], 2)[-budget:]
        return even.expand(*keys.shape[:-2], -1)

    def protected_tokens(self, budget: int) -> int:
        return budget


EVERY_SECOND = f"{__name__}:EverySecond"


class FailsOnLongPrompts(EverySecond):
    """Raises where a prompt has more than 700 tokens."""

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        if keys.shape[-2] > 700:
            raise RuntimeError("this policy fails on purpose")
        return super().select(keys, queries, budget)


FAILS_ON_LONG_PROMPTS = f"{__name__}:FailsOnLongPrompts"
