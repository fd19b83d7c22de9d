"""Drafts as lists, which end where they are of no use."""

import torch
from torch import Tensor

from vllm_budgetdraft.proposer.draft_length import confident_lengths

#: In the place of a draft token whose logits were not finite, and of those that the
#: drafter is not confident of.
NOT_FINITE, NOT_CONFIDENT = -1, -2


def marked(tokens: Tensor, confidences: Tensor, threshold: float) -> list[list[int]]:
    """Drafts [B, k]; ``NOT_FINITE`` or ``NOT_CONFIDENT`` where they are of no use."""
    lengths = confident_lengths(confidences, threshold)[:, None]
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    tokens = tokens.masked_fill(positions >= lengths, NOT_CONFIDENT)
    return tokens.masked_fill(~confidences.isfinite(), NOT_FINITE).tolist()


def confident(drafted: list[int]) -> list[int]:
    """What comes before the first ``NOT_CONFIDENT``."""
    if NOT_CONFIDENT not in drafted:
        return drafted
    return drafted[: drafted.index(NOT_CONFIDENT)]
