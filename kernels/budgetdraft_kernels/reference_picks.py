"""``greedy_pick`` and ``sampled_pick`` of ``reference``.

Letters in shapes: B requests, V vocabulary, W vocabulary that it is a part of.
"""

from typing import TypeVar

import torch
from torch import Tensor

from budgetdraft_kernels.checks import check_logits

Results = TypeVar("Results", bound=tuple[Tensor | None, ...])


def greedy_pick(
    logits: Tensor,
    *,
    ids: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor]:
    """The likeliest token, and how sure the model is of it.

    Args:
        logits: [B, V].
        ids: [V] int64, the token of each logit; its place if None.
        out: receives the results, and is returned.
        validate: whether to check the arguments; reads ids back, which waits for the
            device.

    Returns:
        [B] int64, the first of the largest logits; and its probability, [B] float32.
        Where the largest is not finite: any token of the vocabulary, and NaN.

    Raises:
        ValueError, TypeError: logits of another shape, layout or type.
    """
    if validate:
        check_logits(logits, ids=ids, out=out)
    places = logits.max(-1).indices
    tokens = places if ids is None else ids[places]
    return _written((tokens, logits.float().softmax(-1).amax(-1)), out)


def sampled_pick(
    logits: Tensor,
    temperatures: Tensor,
    uniforms: Tensor,
    *,
    ids: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor | None] | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A token drawn from the softmax, with what rejection sampling needs to undo it.

    By inversion: the first token up to which the softmax sums to more than a uniform
    number. So a draw depends on its row alone, and but for rounding not on the backend.

    Args:
        logits: [B, V].
        temperatures: [B] float32. At 0 the likeliest token is picked, and has all the
            probability.
        uniforms: [B] float32, of [0, 1), a new one for every draw.
        ids: [V] int64, the token of each logit, all different; its place if None.
        out: receives the results, and is returned. Where its last is None, or ids are
            given and no out, what tokens are drawn from is not made. With ids its last
            is [B, W], in which other tokens keep what they have.
        validate: whether to check the arguments; reads temperatures, uniforms and ids
            back, which waits for the device.

    Returns:
        [B] int64 tokens; the largest probability of logits / temperature (of the
        logits where that is 0), [B] float32; and the distribution that each token was
        drawn from, [B, V] float32, or None. The second is no function of the draw:
        whoever decides by it whether to propose a token leaves its distribution as it
        is.
        Where the largest logit is not finite: any token of the vocabulary, and NaN.

    Raises:
        ValueError: sizes or devices that do not fit, a temperature below 0, or a
            uniform number outside [0, 1).
        TypeError: a tensor of another type.
    """
    if validate:
        check_logits(logits, temperatures, uniforms, ids, out)
    greedy = temperatures[:, None] == 0
    # Less the largest first: what a low temperature makes large holds no noise.
    x = logits.float() - logits.float().amax(-1, keepdim=True)
    x = x / temperatures[:, None].masked_fill(greedy, 1.0)
    weights = x.exp()
    sums = weights.double().cumsum(-1)
    total = sums[:, -1:]
    drawn = torch.searchsorted(sums, uniforms[:, None] * total, right=True)
    places = torch.where(greedy, x.argmax(-1, keepdim=True), drawn)
    places.clamp_(max=x.shape[1] - 1)  # of a row that has no sum
    share = total.reciprocal().float()  # of the likeliest, which weighs 1
    drawn_from = None
    if out[2] is not None if out else ids is None:
        one_hot = torch.zeros_like(x).scatter(1, places, 1.0)
        drawn_from = torch.where(greedy, one_hot, weights * share)
    tokens, confidences = places[:, 0], share[:, 0]
    if ids is None:
        return _written((tokens, confidences, drawn_from), out)
    if out and out[2] is not None and drawn_from is not None:
        out[2][:, ids] = drawn_from
    return _written((ids[tokens], confidences, None), out)


def _written(results: Results, out: Results | None) -> Results:
    if out is None:
        return results
    for place, result in zip(out, results, strict=True):
        if place is not None and result is not None:
            place.copy_(result)
    return out
