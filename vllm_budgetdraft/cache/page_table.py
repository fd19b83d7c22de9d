"""The pages each slot holds, in order."""

import torch
from torch import Tensor

from vllm_budgetdraft.cache.ranges import packed_ranges, runs


class PageTable:
    """Page numbers by slot.

    Attributes:
        pages: [num_slots + 1, pages_per_slot] int64; row of a slot in the order of its
            tokens. Rows of released slots are stale; the last one is the spare page.
    """

    def __init__(
        self,
        num_slots: int,
        pages_per_slot: int,
        spare_page: int,
        device: torch.device,
    ) -> None:
        self.pages = torch.zeros(
            (num_slots + 1, pages_per_slot), dtype=torch.int64, device=device
        )
        self.pages[num_slots] = spare_page

    def assign(self, slot: int, pages: list[int]) -> None:
        """Gives a slot its pages, as many as a row has or fewer."""
        self.pages[slot, : len(pages)] = packed_ranges(runs(pages), self.pages.device)

    def cells(self, slots: Tensor, indices: Tensor, page_size: int) -> Tensor:
        """Cells (page * page_size + offset) of cache indices.

        Args:
            slots: [B] int64.
            indices: [B, T] int64, cache indices of each slot.

        Returns:
            [B, T] int64.
        """
        # Whole rows of slots would be large where they are many, one for each token.
        pages = self.pages[slots[:, None], indices // page_size]
        return pages * page_size + indices % page_size

    def reorder(self, slots: Tensor, due: Tensor, order: Tensor) -> None:
        """Sorts the rows of the slots that are ``due`` [B] bool by ``order`` [B, N]."""
        rows = self.pages[slots]
        self.pages[slots] = torch.where(due[:, None], rows.gather(1, order), rows)
