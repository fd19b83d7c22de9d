"""How many tokens to draft, by a rule: of the batch size, or of the confidence."""

from collections.abc import Sequence

from torch import Tensor


def scheduled_length(
    schedule: Sequence[tuple[int, int, int]] | None, batch_size: int, max_length: int
) -> int:
    """Draft length that a schedule has for a batch size, as vLLM reads one.

    Args:
        schedule: (first, last, length) for ranges of batch sizes, both ends included,
            in order and from 1 on. Between two ranges, and after the last, the range
            before goes on. None is no schedule.
        max_length: at most.
    """
    for first, _, length in reversed(schedule or ()):
        if first <= batch_size:
            return min(length, max_length)
    return max_length


def confident_lengths(confidences: Tensor, threshold: float) -> Tensor:
    """Drafts before the first at which the product of confidences is below a threshold.

    The verification length of Flex Decoding (FlexDraft, "cumulative_product"), but for
    its lower bound of 1. It leaves sampled drafts the distribution they were drawn from
    as long as no confidence depends on its own draw, see ``gumbel_pick``.

    Args:
        confidences: [B, k], probabilities; what follows one that is NaN is not counted.

    Returns:
        [B] int64, 0 to k.
    """
    return (confidences.cumprod(-1) >= threshold).sum(-1)
