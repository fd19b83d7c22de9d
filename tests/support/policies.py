"""Policies that a user might bring."""

from types import ModuleType

import torch
from torch import Tensor

from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
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


class PoisonsLongPrompts(EverySecond):
    """Leaves NaN among the keys of a prompt of more than 700 tokens."""

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        if keys.shape[-2] > 700:
            keys[..., ::64, :] = torch.nan
        return super().select(keys, queries, budget)


class KnowsItsCache(EverySecond):
    """Knows the cache of its process and the slot that was started last."""

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        super().__init__(settings, operations)
        original = BudgetedCache.start_request

        def start_request(cache: BudgetedCache, slot: int) -> None:
            self.cache, self.slot = cache, slot
            original(cache, slot)

        BudgetedCache.start_request = start_request


class CorruptsTheTable(KnowsItsCache):
    """Has a prompt of more than 700 tokens list one of its pages twice."""

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        if keys.shape[-2] > 700:
            pages = self.cache.page_table.pages[self.slot]
            pages[0] = pages[1]
        return super().select(keys, queries, budget)


class ExhaustsThePool(KnowsItsCache):
    """Takes every free page away at a prompt of more than 700 tokens."""

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        if keys.shape[-2] > 700:
            # With those of the request that reads it, once it is over.
            self.cache.pool.give_back = lambda pages: None
            self.cache.pool.take(self.cache.pool.num_free)
        return super().select(keys, queries, budget)


POISONS_LONG_PROMPTS = f"{__name__}:PoisonsLongPrompts"
CORRUPTS_THE_TABLE = f"{__name__}:CorruptsTheTable"
EXHAUSTS_THE_POOL = f"{__name__}:ExhaustsThePool"
