"""Attention of draft tokens over the pages of the budgeted cache."""

from torch import Tensor

from budgetdraft_kernels.reference import paged_cache_write, paged_sparse_attention
from vllm_budgetdraft.cache.page_pool import PagePool


class PagedAttention:
    """The ``attend`` of a drafter that drafts: writes its tokens, then reads pages."""

    def __init__(self, pool: PagePool, page_table: Tensor) -> None:
        """
        Args:
            page_table: [B, pages_per_slot] int64, of the requests that draft.
        """
        self._layers = pool.layers
        self._page_table = page_table

    def step(self, cells: Tensor, lengths: Tensor) -> "PagedAttention":
        """Where the next tokens go, and what each may look at.

        Args:
            cells: [B, W] int64.
            lengths: [B, W] int64, tokens of the slot up to and with each token.
        """
        self._cells, self._lengths = cells.flatten(), lengths
        return self

    def __call__(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Queries [B, W, H, D], keys and values [B, W, G, D] to [B, W, H, D]."""
        key_pages, value_pages = self._layers[layer]
        paged_cache_write(keys, values, key_pages, value_pages, self._cells)
        return paged_sparse_attention(
            queries, key_pages, value_pages, self._page_table, self._lengths
        )
