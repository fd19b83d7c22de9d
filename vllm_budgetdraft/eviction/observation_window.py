"""The positions that the end of the prompt looks at."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.eviction.base import all_positions, four_dimensions


class ObservationWindow:
    """Keeps the sinks, the positions with most attention, and the observing tokens.

    Based on SnapKV (https://arxiv.org/abs/2404.14469), section 4: positions are ranked
    per layer and KV head by the attention that the last ``observation_tokens`` queries
    give them, averaged over ``pooling_size`` neighbours so that whole phrases stay.

    Deviations: the first ``sink_tokens`` always stay; attention is shared out among the
    positions before the window alone; the window takes at most half of what the sinks
    leave of the budget.
    """

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        self._chunk_scores = operations.chunk_scores
        self.observation_tokens = settings.observation_tokens
        self.sink_tokens = settings.sink_tokens
        self.pooling_size = settings.pooling_size

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        num_tokens, sinks = keys.shape[-2], self.sink_tokens
        if num_tokens <= budget:
            return all_positions(keys)
        assert queries is not None
        window = min(self.observation_tokens, (budget - sinks) // 2)
        end = num_tokens - window
        weights = self._chunk_scores(
            four_dimensions(keys[..., :end, :]),
            four_dimensions(queries),
            chunk_size=1,
            score="attention",
        )
        scores = F.avg_pool1d(
            weights.flatten(0, 1),
            self.pooling_size,
            stride=1,
            padding=self.pooling_size // 2,
            count_include_pad=False,
        )
        scores = scores.view(*keys.shape[:-2], end)[..., sinks:]
        best = scores.topk(budget - sinks - window, dim=-1, sorted=False).indices
        chosen = sinks + best.sort(-1).values
        shape = (*keys.shape[:-2], -1)
        first = torch.arange(sinks, device=keys.device).expand(shape)
        last = torch.arange(end, num_tokens, device=keys.device).expand(shape)
        return torch.cat([first, chosen, last], dim=-1)

    def protected_tokens(self, budget: int) -> int:
        return budget
