"""Attention sinks and a recent window."""

import torch
from torch import Tensor

from vllm_budgetdraft.eviction.base import EvictionPolicy, PromptStates


class SinkWindow(EvictionPolicy):
    """Keeps the first ``sink_tokens`` and the most recent of the rest.

    Based on StreamingLLM (https://arxiv.org/abs/2309.17453), section 3.2; with
    ``position_mode`` cache_relative, positions are those of the cache, as there. Where
    a prompt is read streaming, the tokens between are never looked at.
    """

    def select(self, states: PromptStates, budget: int) -> Tensor:
        num_tokens = states.num_tokens
        if num_tokens <= budget:
            return states.all_positions()
        sinks = self.settings.sink_tokens
        recent = num_tokens - (budget - sinks)
        return torch.cat(
            [states.positions(0, sinks), states.positions(recent, num_tokens)], dim=-1
        )

    def protected_tokens(self, budget: int) -> int:
        return self.settings.sink_tokens

    def unread(self, num_tokens: int, budget: int) -> range:
        if num_tokens <= budget:
            return range(0)
        sinks = self.settings.sink_tokens
        return range(sinks, num_tokens - (budget - sinks))
