"""Distances between the drafter's predictions and the target's.

Logits are [..., vocab_size] float32, labels [...] int64; the mean is over positions,
and labels of ``IGNORED`` count for nothing.
"""

import torch.nn.functional as F
from torch import Tensor

#: Label of a position without one, as ``torch`` and ``transformers`` have it.
IGNORED = -100


def ce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_S(x*), with x* the target's argmax: BudgetDraft, equations 5 and 6."""
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED
    )


def kl_loss(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(p_L || p_S), the usual distillation loss."""
    return F.kl_div(
        logits.log_softmax(-1).flatten(0, -2),
        target_logits.log_softmax(-1).flatten(0, -2),
        log_target=True,
        reduction="batchmean",
    )


def agreement(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of positions where the argmax is the label: greedy acceptance per token."""
    labelled = labels != IGNORED
    return (logits.argmax(-1) == labels)[labelled].float().mean()
