"""Attention of draft tokens over the pages of the budgeted cache."""

from types import ModuleType

from torch import Tensor

from vllm_budgetdraft.cache.page_pool import PagePool


class PagedAttention:
    """The ``attend`` of a drafter that drafts: writes its tokens, then reads pages."""

    def __init__(
        self,
        operations: ModuleType,
        pool: PagePool,
        page_table: Tensor,
        *,
        validate: bool,
    ) -> None:
        """
        Args:
            operations: see ``select_operations``.
            page_table: [B, pages_per_slot] int64, of the requests that draft.
            validate: whether the operations check what they are given.
        """
        self._operations = operations
        self._layers = pool.layers
        self._page_table = page_table
        self._validate = validate

    def step(
        self,
        rotary: tuple[Tensor, Tensor],
        cells: Tensor,
        lengths: Tensor,
        query_starts: Tensor,
        width: int,
    ) -> "PagedAttention":
        """Where the next tokens stand and go, request after request.

        Args:
            rotary: cos and sin of their positions, [B * width, D] each.
            cells: [B * width] int64.
            lengths: [B] int64, tokens of the slot with the next ones.
            query_starts: [B + 1] int64, multiples of ``width``.
        """
        self._rotary, self._cells = rotary, cells
        self._lengths, self._query_starts, self._width = lengths, query_starts, width
        return self

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[B * width, H + 2 * G, D] to [B * width, H, D]."""
        key_pages, value_pages = self._layers[layer]
        queries = self._operations.paged_cache_write(
            qkv,
            *self._rotary,
            key_pages,
            value_pages,
            self._cells,
            validate=self._validate,
        )
        return self._operations.paged_sparse_attention(
            queries,
            key_pages,
            value_pages,
            self._page_table,
            self._lengths,
            self._query_starts,
            max_query_tokens=self._width,
            validate=self._validate,
        )
