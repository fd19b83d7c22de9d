"""Distances between the drafter's predictions and the target's.

Each takes the drafter's and the target's logits, [..., vocab_size] float32, and returns
the mean over positions.
"""

import torch.nn.functional as F
from torch import Tensor


def ce_loss(logits: Tensor, target_logits: Tensor) -> Tensor:
    """-log p_S(argmax p_L): BudgetDraft, equations 5 and 6."""
    labels = target_logits.argmax(-1)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def kl_loss(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(p_L || p_S), the usual distillation loss."""
    return F.kl_div(
        logits.log_softmax(-1).flatten(0, -2),
        target_logits.log_softmax(-1).flatten(0, -2),
        log_target=True,
        reduction="batchmean",
    )


LOSSES = {"ce": ce_loss, "kl": kl_loss}


def agreement(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Share of positions where both argmaxes agree: greedy acceptance per token."""
    return (logits.argmax(-1) == target_logits.argmax(-1)).float().mean()
