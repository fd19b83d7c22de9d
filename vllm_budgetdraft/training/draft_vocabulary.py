"""Which tokens a drafter learns to draft, where these are a part of the vocabulary."""

import torch
from torch import Tensor, nn

from vllm_budgetdraft.training.objectives import IGNORED, OUTSIDE


class DraftVocabulary(nn.Module):
    """The tokens that have logits, and of each token the place of its logit.

    Attributes:
        ids: [n] int64, the token of each logit, the likeliest first.
        places: [vocab_size] int64, of each token; ``OUTSIDE`` of those without one.
    """

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        """
        Args:
            ids: [n] int64, different, below ``vocab_size``.
        """
        super().__init__()
        places = torch.full((vocab_size,), OUTSIDE)
        places[ids] = torch.arange(len(ids))
        self.ids: Tensor
        self.places: Tensor
        # No part of what checkpoints hold: these have a file of their own.
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("places", places, persistent=False)

    def labels(self, tokens: Tensor) -> Tensor:
        """Places of tokens [...] int64; ``IGNORED`` stays."""
        return self.places[tokens.clamp_min(0)].where(tokens != IGNORED, IGNORED)
