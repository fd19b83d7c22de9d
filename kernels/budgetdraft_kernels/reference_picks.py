"""``greedy_pick`` and ``gumbel_pick`` of ``reference``.

Letters in shapes: B requests, V vocabulary.
"""

from typing import TypeVar

import torch
from torch import Tensor

from budgetdraft_kernels.checks import check_logits
from budgetdraft_kernels.philox import philox_uniform

Results = TypeVar("Results", bound=tuple[Tensor | None, ...])


def greedy_pick(
    logits: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor]:
    """The likeliest token, and how sure the model is of it.

    Args:
        logits: [B, V].
        out: receives the results, and is returned.
        validate: whether to check the arguments.

    Returns:
        [B] int64, the first of the largest logits; and its probability, [B] float32.
        Where the largest is not finite: any token of the vocabulary, and NaN.

    Raises:
        ValueError, TypeError: logits of another shape, layout or type.
    """
    if validate:
        check_logits(logits, out=out)
    picked = logits.max(-1).indices, logits.float().softmax(-1).amax(-1)
    return _written(picked, out)


def gumbel_pick(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    *,
    out: tuple[Tensor, Tensor, Tensor | None] | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A token drawn from the softmax, with what rejection sampling needs to undo it.

    Gumbel-max: the largest of logit / temperature + noise is a draw from the softmax.
    The noise of an entry depends on its row's seed and its column alone (Philox-4x32,
    Salmon et al., 2011), so that a draw does not depend on the batch or the backend.

    Args:
        logits: [B, V].
        temperatures: [B] float32. At 0 the likeliest token is picked, and has all the
            probability.
        seeds: [B] int64, a new one for every draw.
        out: receives the results, and is returned. Where its last is None, what tokens
            are drawn from is not made.
        validate: whether to check the arguments; reads temperatures back, which waits
            for the device.

    Returns:
        [B] int64 tokens; the largest probability of logits / temperature (of the
        logits where that is 0), [B] float32; and the distribution that each token was
        drawn from, [B, V] float32, or None. The second is no function of the draw:
        whoever decides by it whether to propose a token leaves its distribution as it
        is.
        Where the largest logit is not finite: any token of the vocabulary, and NaN.

    Raises:
        ValueError: sizes or devices that do not fit, or a temperature below 0.
        TypeError: a tensor of another type.
    """
    if validate:
        check_logits(logits, temperatures, seeds, out)
    greedy = temperatures[:, None] == 0
    # Less the largest first: what a low temperature makes large holds no noise.
    x = logits.float() - logits.float().amax(-1, keepdim=True)
    x = x / temperatures[:, None].masked_fill(greedy, 1.0)
    uniform = philox_uniform(seeds, logits.shape[1])
    noise = -(-uniform.log()).log()
    tokens = torch.where(greedy, x, x + noise).argmax(-1, keepdim=True)
    softmax = x.softmax(-1)
    drawn_from = None
    if out is None or out[2] is not None:
        one_hot = torch.zeros_like(x).scatter(1, tokens, 1.0)
        drawn_from = torch.where(greedy, one_hot, softmax)
    return _written((tokens[:, 0], softmax.amax(-1), drawn_from), out)


def _written(results: Results, out: Results | None) -> Results:
    if out is None:
        return results
    for place, result in zip(out, results, strict=True):
        if place is not None and result is not None:
            place.copy_(result)
    return out
