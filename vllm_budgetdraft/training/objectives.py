"""Distances between the drafter's predictions q and the target's p, per position.

Each takes logarithms of probabilities [..., V] and returns [...]. alpha, the chance
that a draft from q is accepted when p verifies it, is sum_i min(p_i, q_i).

Where only the likeliest tokens of p are known, sums are over these: all others count as
never accepted. (Were they one event, any of them would do for the drafter.) Where q is
of a part of the vocabulary, sums are over that part, and p is as it is, for what it has
elsewhere is never accepted; KL alone takes ``renormalised``.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Label of a position without one, as ``torch`` and ``transformers`` have it.
IGNORED = -100
#: Label of a position whose token is not drafted.
OUTSIDE = -1
#: log p of what cannot be: float32 has no smaller p, but 0 and a few beside it.
NO_CHANCE = math.log(torch.finfo(torch.float32).tiny)
#: eta of ``lk_hybrid_loss``; what the LK paper found best for drafters that are models.
HYBRID_DECAY = 3.0


def ce_loss(log_q: Tensor, labels: Tensor) -> Tensor:
    """-log q(x*), with x* the target's choice: BudgetDraft, equations 5 and 6.

    Args:
        labels: [...] int64; the loss is 0 where they are ``IGNORED``.
    """
    flat = F.nll_loss(
        log_q.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view(labels.shape)


def kl_loss(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) = sum_i p_i (log p_i - log q_i); its gradient in logits is q - p.

    A token that cannot be, whose log p is -inf, adds nothing.
    """
    log_p = log_p.clamp_min(torch.finfo(log_p.dtype).min)  # which times 0 is 0
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def renormalised(log_p: Tensor, share: Tensor) -> Tensor:
    """log p of a part of the vocabulary, of that part alone.

    Args:
        log_p: [..., V].
        share: [...], of p on that part; where it is 0, KL with what is returned is 0,
            and so is its gradient.
    """
    share = share[..., None]
    log_share = share.where(share > 0, 1).log()
    return (log_p - log_share).where(share > 0, -torch.inf)


def acceptance(log_q: Tensor, log_p: Tensor) -> Tensor:
    """alpha = sum_i min(p_i, q_i)."""
    return torch.minimum(log_q, log_p).exp().sum(-1)


def tv_loss(log_q: Tensor, log_p: Tensor) -> Tensor:
    """TV(p, q) = 1 - alpha.

    Its gradient in logits is q_j (sum of q_i where q_i < p_i, less 1 where q_j < p_j):
    next to nothing for a q that knows nothing, so it goes on from a trained drafter.
    """
    return 1 - acceptance(log_q, log_p)


def lk_alpha_loss(log_q: Tensor, log_p: Tensor) -> Tensor:
    """-log alpha (LK losses, https://arxiv.org/abs/2602.23881).

    Its gradient is that of TV over alpha, however small that is; where p is certain it
    is the cross-entropy. Where p gives no token a chance, nothing can be learnt: loss
    and gradient are 0.
    """
    has_chance = log_p.amax(-1, keepdim=True) > NO_CHANCE
    both = torch.minimum(log_q, log_p.where(has_chance, 0))
    return -both.logsumexp(-1).where(has_chance.squeeze(-1), 0)


def lk_hybrid_loss(
    log_q: Tensor, log_p: Tensor, log_p_of_kl: Tensor | None = None
) -> Tensor:
    """w KL + (1 - w) TV, with w = exp(-eta alpha), not differentiated (LK losses).

    Of each position by itself: KL where the drafter is far off, TV where it is near.

    Args:
        log_p_of_kl: what KL compares with, see ``renormalised``; ``log_p`` if None.
    """
    if log_p_of_kl is None:
        log_p_of_kl = log_p
    tv = tv_loss(log_q, log_p)
    weight = torch.exp(HYBRID_DECAY * (tv.detach() - 1))
    return weight * kl_loss(log_q, log_p_of_kl) + (1 - weight) * tv


#: By name, those that compare distributions; "ce" compares with labels.
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl_loss,
    "tv": tv_loss,
    "lk_alpha": lk_alpha_loss,
    "lk_hybrid": lk_hybrid_loss,
}


def decayed_weights(block: int, decay: float) -> Tensor:
    """decay ** i for the i-th token of a draft, [block], of mean 1."""
    weights = decay ** torch.arange(block, dtype=torch.float32)
    return weights / weights.mean()


def dpace_weights(label_probabilities: Tensor, smoothing: float) -> Tensor:
    """What each position of a draft adds to its accepted length (D-PACE).

    w_j = sum_{k >= j} prod_{i <= k} s_i, with s_i = (1 - a) q_i + a, over the number of
    positions (https://arxiv.org/abs/2605.18810).

    Args:
        label_probabilities: [..., block], q of each label; not differentiated.
        smoothing: a, in [0, 1].

    Returns:
        [..., block].
    """
    steps = (1 - smoothing) * label_probabilities.detach() + smoothing
    reached = steps.cumprod(-1)
    return reached.flip(-1).cumsum(-1).flip(-1) / steps.shape[-1]
