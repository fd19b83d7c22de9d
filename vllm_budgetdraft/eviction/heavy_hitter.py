"""The positions that have been looked at most."""

import torch
from torch import Tensor

from vllm_budgetdraft.eviction.base import EvictionPolicy, PromptStates


class HeavyHitter(EvictionPolicy):
    """Keeps the sinks, the heavy hitters and the most recent positions.

    Based on H2O (https://arxiv.org/abs/2306.14048), section 4: positions are ranked per
    layer and KV head by the attention that all queries so far have given them, and half
    of the budget is for the most recent ones.

    Deviations: the first ``sink_tokens`` always stay; attention is summed over the
    query heads that share a KV head; a prompt is cut down in the end or after every
    chunk, not after every token, and generation gives up whole pages, ranked over all
    layers and heads and by the attention of refused drafts too.
    """

    accumulates_attention = True

    def select(self, states: PromptStates, budget: int) -> Tensor:
        num_tokens, sinks = states.num_tokens, self.settings.sink_tokens
        if num_tokens <= budget:
            return states.all_positions()
        assert states.attention is not None
        recent = (budget - sinks) // 2
        end = num_tokens - recent
        scores = states.attention[..., sinks:end]
        best = scores.topk(budget - sinks - recent, dim=-1, sorted=False).indices
        chosen = sinks + best.sort(-1).values
        first, last = states.positions(0, sinks), states.positions(end, num_tokens)
        return torch.cat([first, chosen, last], dim=-1)

    def protected_tokens(self, budget: int) -> int:
        return self.settings.sink_tokens
