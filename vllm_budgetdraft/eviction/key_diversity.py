"""The positions whose keys are least like the others'."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_budgetdraft.eviction.base import PromptStates, RankingPolicy


class KeyDiversity(RankingPolicy):
    """Keeps the sinks, the keys that differ most, and the end of the prompt.

    Based on KeyDiff (https://arxiv.org/abs/2504.15364), section 3: a position goes the
    sooner, the larger the cosine of its key and the mean of all keys' directions. No
    query has a part in it.

    Deviations: the first ``sink_tokens`` always stay, and so do the last
    ``local_tokens``, at most half of what the sinks leave; a prompt is cut down in the
    end or after every chunk, and generation gives up its oldest tokens.
    """

    def num_recent(self, room: int) -> int:
        return min(self.settings.local_tokens, room // 2)

    def scores(self, states: PromptStates, end: int) -> Tensor:
        keys = states.keys
        # In place of directions, which would be as large again: their lengths.
        lengths = torch.linalg.vector_norm(keys, dim=-1).clamp_min(1e-6)
        mean = lengths.reciprocal()[..., None, :] @ keys
        mean = F.normalize(mean, dim=-1)
        cosines: Tensor = (keys[..., :end, :] @ mean.mT)[..., 0] / lengths[..., :end]
        return -cosines
