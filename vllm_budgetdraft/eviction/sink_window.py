"""Attention sinks and a recent window."""

from types import ModuleType

import torch
from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.eviction.base import all_positions


class SinkWindow:
    """Keeps the first ``sink_tokens`` and the most recent of the rest.

    Based on StreamingLLM (https://arxiv.org/abs/2309.17453), section 3.2. Unlike
    there, keys keep the rotation of their true position.
    """

    observation_tokens = 0

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        self.sink_tokens = settings.sink_tokens

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        num_tokens = keys.shape[-2]
        if num_tokens <= budget:
            return all_positions(keys)
        sinks = torch.arange(self.sink_tokens, device=keys.device)
        recent = torch.arange(
            num_tokens - (budget - self.sink_tokens), num_tokens, device=keys.device
        )
        kept = torch.cat([sinks, recent])
        return kept.expand(*keys.shape[:-2], -1)

    def protected_tokens(self, budget: int) -> int:
        return self.sink_tokens
