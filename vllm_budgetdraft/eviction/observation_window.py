"""The positions that the end of the prompt looks at."""

from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.eviction.base import (
    PromptStates,
    RankingPolicy,
    chunk_scores,
)


class ObservationWindow(RankingPolicy):
    """Keeps the sinks, the positions with most attention, and the observing tokens.

    Based on SnapKV (https://arxiv.org/abs/2404.14469), section 4: positions are ranked
    per layer and KV head by the attention that the last ``observation_tokens`` queries
    give them, averaged over ``pooling_size`` neighbours so that whole phrases stay.

    Deviations: the first ``sink_tokens`` always stay; the window takes at most half of
    what the sinks leave of the budget.
    """

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        super().__init__(settings, operations)
        self.observation_tokens = settings.observation_tokens

    def num_recent(self, room: int) -> int:
        return min(self.observation_tokens, room // 2)

    def scores(self, states: PromptStates, end: int) -> Tensor:
        assert states.queries is not None
        weights = chunk_scores(
            self.operations, states.keys, states.queries, 1, "attention"
        )[..., :end]
        pooling_size = self.settings.pooling_size
        scores = F.avg_pool1d(
            weights.reshape(-1, end),
            pooling_size,
            stride=1,
            padding=pooling_size // 2,
            count_include_pad=False,
        )
        return scores.view(*states.keys.shape[:-2], end)
