"""Pages between two requests."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages that no slot holds any more, and what is in them.

    Attributes:
        held: their numbers.
        order: [n] int64, the same in the order of tokens, on the device.
        received: [n] float32, what each has received; None unless eviction goes by it.
        whole_at, num_evicted_then: from which position on every token was held when
            the slot began, and how many it had evicted by then.
        num_protected: first tokens, of whole pages, that were never evicted.
    """

    held: list[int]
    order: Tensor
    received: Tensor | None
    whole_at: int
    num_evicted_then: int
    num_protected: int

    def whole_from(self, num_evicted: int, end: int) -> int:
        """From which position on all up to ``end`` are held, as far as is known.

        Args:
            num_evicted: positions below ``end`` that are not held.
        """
        if num_evicted == self.num_evicted_then:
            return self.whole_at
        if self.received is not None:  # any page may have been evicted
            return end
        return max(self.whole_at, self.num_protected + num_evicted)
