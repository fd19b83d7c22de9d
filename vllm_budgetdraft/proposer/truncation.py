"""Top-k, top-p and min-p of drafts: what the target will never sample is not drawn."""

import torch
from torch import Tensor

#: Likeliest tokens that are looked at, for to sort a vocabulary takes longer than the
#: rest of a draft step. What would keep more keeps all.
LOOKED_AT = 256


def truncated(logits: Tensor, temperatures: Tensor, cuts: Tensor) -> Tensor:
    """Logits, and -inf where a request's own cuts leave a token no probability.

    As vLLM cuts the target's: of the softmax at a temperature first min-p, then top-k,
    then top-p of what is left. Drafts are lossless whatever they are drawn from; those
    drawn from a tail that the target does not have are lost.

    Args:
        logits: [B, V].
        temperatures: [B] float32; at 0 nothing is cut.
        cuts: [B, 3] float32: top-k, or 0 for none; top-p, or 1; and min-p, or 0.
    """
    top_k, top_p, min_p = (x[:, None] for x in cuts.unbind(1))
    scale = temperatures.masked_fill(temperatures == 0, 1.0)[:, None]
    values = logits.topk(min(LOOKED_AT, logits.shape[1])).values
    x = values.float() / scale
    places = torch.arange(x.shape[1], device=x.device)
    kept = x - x[:, :1] >= min_p.log()
    kept &= (places < top_k) | (top_k < 1)
    # Of all tokens, unless some of those looked at are cut, and so all behind them.
    all_kept = kept.all(-1, keepdim=True)
    total = (logits.float() / scale).logsumexp(-1, keepdim=True)
    some = x.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)
    shares = (x - torch.where(all_kept, total, some)).exp()
    kept &= (shares.cumsum(-1) - shares < top_p) | (top_p >= 1)
    last = kept.sum(-1, keepdim=True).clamp_(min=1) - 1
    is_cut = ~kept.all(-1, keepdim=True) & (temperatures[:, None] > 0)
    floor = values.gather(1, last).masked_fill_(~is_cut, -torch.inf)
    return logits.masked_fill(logits < floor, -torch.inf)
