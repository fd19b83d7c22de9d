"""Top-k of drafts."""

import torch
from torch import Tensor

#: Likeliest tokens that are looked at, so that no vocabulary is sorted in a draft step.
#: A larger top-k is none.
LOOKED_AT = 256


def truncated(logits: Tensor, top_k: Tensor) -> Tensor:
    """Logits, and -inf but for the likeliest.

    Drafts are lossless whatever they are drawn from. A target that samples its k
    likeliest tokens never takes the drafter's tail, in which drafts are lost. By top-p
    and min-p nothing is cut: the drafter's nucleus lacks much of the target's, which
    would then never be drafted.

    Args:
        logits: [B, V].
        top_k: [B] int64, how many stay, and what is as likely as the last; 0 for all.
    """
    values = logits.topk(min(LOOKED_AT, logits.shape[1])).values
    last = top_k.clamp(1, values.shape[1]) - 1
    is_cut = (top_k > 0) & (top_k <= values.shape[1])
    left_out = logits < values.gather(1, last[:, None])
    return logits.masked_fill(left_out & is_cut[:, None], -torch.inf)
