"""How many tokens to draft: what there is to choose from, and rules to choose by."""

from collections.abc import Sequence

from torch import Tensor

from vllm_budgetdraft.config import BudgetDraftConfig


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


def draft_lengths(config: BudgetDraftConfig) -> list[int]:
    """Lengths worth a graph, ascending: those that steps may often have."""
    longest = config.num_speculative_tokens
    if config.adaptive_draft_length:
        return doublings(longest)
    schedule = config.num_speculative_tokens_per_batch_size or ()
    lengths = {longest, *(min(length, longest) for *_, length in schedule)}
    return sorted(lengths - {0})


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... below ``most``, and that."""
    powers = (1 << i for i in range(most.bit_length()))
    return [*(power for power in powers if power < most), most]


def ladder(longest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... below ``longest``, and that."""
    steps = [1]
    while steps[-1] < longest:
        last = steps[-1]
        power = 1 << (last.bit_length() - 1)
        steps.append(last + max(1, power // 2))
    return [*(step for step in steps if step < longest), longest]


def confident_lengths(confidences: Tensor, threshold: float) -> Tensor:
    """Drafts before the first at which the product of confidences is below a threshold.

    The verification length of Flex Decoding (FlexDraft, "cumulative_product"), but for
    its lower bound of 1. It leaves sampled drafts the distribution they were drawn from
    as long as no confidence depends on its own draw, see ``sampled_pick``.

    Args:
        confidences: [B, k], probabilities; what follows one that is NaN is not counted.

    Returns:
        [B] int64, 0 to k.
    """
    return (confidences.cumprod(-1) >= threshold).sum(-1)
