"""One context that is being read before drafting."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from vllm_budgetdraft.attention.prompt import Segment
from vllm_budgetdraft.eviction.reading import ReadingPlan
from vllm_budgetdraft.proposer.snapshots import States


class Begun(NamedTuple):
    """What a slot's cache has of a context before it is read on.

    Attributes:
        num_seen: tokens that need not be read.
        num_held: of them, those in its cache.
    """

    num_seen: int = 0
    num_held: int = 0


class Mark(NamedTuple):
    """A place in a context where what a policy would keep is copied for others.

    Attributes:
        at: number of tokens that were read.
        keep: takes keys, values and attention of the buffer, and rows of these.
    """

    at: int
    keep: Callable[[States, Tensor], None]


@dataclass(eq=False)
class Reading:
    """A context that is being read.

    Attributes:
        num_tokens: its length.
        budget: most tokens that are kept of it.
        most_held: tokens that it will hold in the buffer at once.
        segment: what it holds; None until there is room for ``most_held``.
        num_seen: tokens that were read or skipped.
        has_chosen: whether the policy has chosen since it last read.
        begun: what its slot has of it from the start.
        mark: None when it was passed.
    """

    slot: int
    plan: ReadingPlan
    num_tokens: int
    budget: int
    most_held: int
    segment: Segment | None = None
    num_seen: int = 0
    has_chosen: bool = False
    begun: Begun = Begun()
    mark: Mark | None = None

    @property
    def unread(self) -> range:
        """Positions to be read next."""
        return self.plan.unread(self.num_seen, self.num_tokens)

    def has_to_choose(self, piece: range) -> bool:
        """Whether the policy is to choose after a piece, and not at the end alone."""
        assert self.segment is not None
        # What a slot began with may leave less room than the plan would have.
        is_full = bool(self.begun.num_held) and bool(self.unread)
        is_full &= self.segment.num_held >= self.most_held
        return is_full or piece.stop == self.plan.next_choice(piece.start)

    def piece(self, limit: int, end: int | None = None) -> range:
        """Tokens to read next: at most ``limit``, none past a choice or ``end``."""
        unread = self.unread
        ends = [unread.stop, self.plan.next_choice(unread.start), end]
        if self.begun.num_held:
            held = self.begun.num_held
            if self.segment is not None:
                held = self.segment.num_held
            ends.append(unread.start + self.most_held - held)
        if self.mark is not None and unread.start < self.mark.at:
            ends.append(self.mark.at)
        stop = min(each for each in ends if each is not None)
        return range(unread.start, max(unread.start, min(stop, unread.start + limit)))
