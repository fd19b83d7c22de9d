"""The positions that have been looked at most."""

from torch import Tensor

from vllm_budgetdraft.eviction.base import PromptStates, RankingPolicy


class HeavyHitter(RankingPolicy):
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

    def num_recent(self, room: int) -> int:
        return room // 2

    def scores(self, states: PromptStates, end: int) -> Tensor:
        assert states.received is not None
        return states.received[..., :end]

    def protected_tokens(self, budget: int) -> int:
        return self.settings.sink_tokens
