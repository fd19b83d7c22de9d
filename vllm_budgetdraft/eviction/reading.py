"""Which tokens of a context a drafter reads, and when its policy chooses."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.eviction.base import EvictionPolicy


@dataclass(frozen=True)
class ReadingPlan:
    """The same in training and in serving, however many tokens an engine gives at once.

    The policy chooses after every piece, and at the end of the context.

    Attributes:
        skipped: positions that are never read.
        first_tokens: of the first piece, which finds nothing held; None where the end
            of the context is the one choice.
        piece_tokens: of the others, in streaming.
    """

    skipped: range = range(0)
    first_tokens: int | None = None
    piece_tokens: int = 0

    @classmethod
    def of(
        cls,
        view: ViewSettings,
        policy: EvictionPolicy,
        *,
        native_tokens: int,
        num_tokens: int,
        budget: int,
    ) -> "ReadingPlan":
        """
        Args:
            native_tokens: longest context that the drafter was made for. Positions
                that are indices in the cache stay below it.
            num_tokens: of the context, as far as it is known.
            budget: most tokens that are kept after a choice.
        """
        if view.draft_prefill == "full" or view.eviction_policy == "keep_all":
            return cls()
        first = piece = view.draft_prefill_chunk
        if view.position_mode == "cache_relative":
            first = min(first, native_tokens)
            piece = min(piece, native_tokens - budget)
        assert piece > 0, (native_tokens, budget)
        return cls(policy.unread(num_tokens, budget), first, piece)

    def most_held(self, num_tokens: int, budget: int) -> int:
        """Tokens of a context of ``num_tokens`` that are held at once, at most."""
        if self.first_tokens is None:
            return num_tokens
        return min(num_tokens, max(self.first_tokens, budget + self.piece_tokens))

    def unread(self, num_seen: int, end: int) -> range:
        """Positions to be read next, in a row, of a context that ends at ``end``.

        Args:
            num_seen: tokens that were read or skipped.
        """
        if num_seen < self.skipped.start:
            return range(num_seen, self.skipped.start)
        return range(max(num_seen, self.skipped.stop), end)

    def next_choice(self, start: int) -> int | None:
        """Where the piece ends that ``start`` is in; None if with the context."""
        if self.first_tokens is None:
            return None
        is_after_gap = bool(self.skipped) and start >= self.skipped.stop
        if start < self.first_tokens and not is_after_gap:
            end = self.first_tokens
        else:
            begun = self.skipped.stop if is_after_gap else self.first_tokens
            end = start + self.piece_tokens - (start - begun) % self.piece_tokens
        is_before_gap = start < self.skipped.start
        return min(end, self.skipped.start) if is_before_gap else end

    def pieces(self, end: int) -> Iterator[range]:
        """What is read before each choice, of a context that ends at ``end``."""
        num_seen = 0
        while unread := self.unread(num_seen, end):
            choice = self.next_choice(unread.start)
            num_seen = unread.stop if choice is None else min(unread.stop, choice)
            yield range(unread.start, num_seen)
