"""Policies that a user might bring."""

from types import ModuleType

import torch
from torch import Tensor

from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.eviction.base import EvictionPolicy, PromptStates


class EverySecond(EvictionPolicy):
    """Keeps the budget's share of even positions, the latest of them."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        return states.all_positions()[..., ::2][..., -budget:]


EVERY_SECOND = f"{__name__}:EverySecond"


class FailsOnLongPrompts(EverySecond):
    """Raises where a prompt has more than 700 tokens."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        if states.num_tokens > 700:
            raise RuntimeError("this policy fails on purpose")
        return super().select(states, budget)


FAILS_ON_LONG_PROMPTS = f"{__name__}:FailsOnLongPrompts"


class PoisonsLongPrompts(EverySecond):
    """Leaves NaN among the keys of a prompt of more than 700 tokens."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        if states.num_tokens > 700:
            states.keys[..., ::64, :] = torch.nan
        return super().select(states, budget)


class KeepsTooMuch(EverySecond):
    """Keeps positions that a prompt of more than 700 tokens does not have."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        kept = super().select(states, budget)
        return kept + states.num_tokens * (states.num_tokens > 700)


class KnowsItsCache(EverySecond):
    """Knows the cache of its process and the slot that was started last."""

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        super().__init__(settings, operations)
        original = BudgetedCache.start_request

        def start_request(cache: BudgetedCache, slot: int, *rest: int) -> None:
            self.cache, self.slot = cache, slot
            original(cache, slot, *rest)

        BudgetedCache.start_request = start_request


class CorruptsTheTable(KnowsItsCache):
    """Has a prompt of more than 700 tokens list one of its pages twice."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        if states.num_tokens > 700:
            pages = self.cache.page_table.pages[self.slot]
            pages[0] = pages[1]
        return super().select(states, budget)


class ExhaustsThePool(KnowsItsCache):
    """Takes every free page away at a prompt of more than 700 tokens."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        if states.num_tokens > 700:
            # With those of the request that reads it, once it is over.
            self.cache.pool.give_back = lambda pages: None
            self.cache.pool.take(self.cache.pool.num_free)
        return super().select(states, budget)


POISONS_LONG_PROMPTS = f"{__name__}:PoisonsLongPrompts"
KEEPS_TOO_MUCH = f"{__name__}:KeepsTooMuch"
CORRUPTS_THE_TABLE = f"{__name__}:CorruptsTheTable"
EXHAUSTS_THE_POOL = f"{__name__}:ExhaustsThePool"
