"""Attention of draft tokens over the pages of the budgeted cache."""

from types import ModuleType

import torch
from torch import Tensor

from budgetdraft_kernels.reference_projections import Norms
from vllm_budgetdraft.cache.page_pool import PagePool

#: Most tokens of a request that ``paged_sparse_attention`` takes at once.
MAX_WIDTH = 32


class PagedAttention:
    """The ``attend`` of a drafter that drafts: writes its tokens, then reads pages.

    Attributes:
        received: [B, pages_per_slot] float32, what the pages received so far, summed
            over layers, heads and tokens; None unless it is counted.
    """

    def __init__(
        self,
        operations: ModuleType,
        pool: PagePool,
        page_table: Tensor,
        *,
        key_rotary: tuple[Tensor, Tensor] | None,
        page_attention: Tensor | None,
        validate: bool,
    ) -> None:
        """
        Args:
            operations: see ``select_operations``.
            page_table: [B, pages_per_slot] int64, of the requests that draft.
            key_rotary: cos and sin of every cache index, where keys are stored as they
                are and rotated when read; None where they are stored rotated.
            page_attention: [>= B * width, H, pages_per_slot] float32, scratch for
                counting attention; None not to count it.
            validate: whether the operations check what they are given.
        """
        self._operations = operations
        self._layers = pool.layers
        self._page_table = page_table
        self._key_rotary = key_rotary
        self._page_attention = page_attention
        self._validate = validate
        self.received: Tensor | None = None
        if page_attention is not None:
            self.received = torch.zeros_like(page_table, dtype=torch.float32)

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

    def __call__(self, layer: int, qkv: Tensor, norms: Norms) -> Tensor:
        """[B * width, H + 2 * G, D] to [B * width, H, D]."""
        key_pages, value_pages = self._layers[layer]
        queries = self._operations.paged_cache_write(
            qkv,
            *self._rotary,
            key_pages,
            value_pages,
            self._cells,
            rotate_keys=self._key_rotary is None,
            norms=norms,
            validate=self._validate,
        )
        share = self._page_attention
        if share is not None:
            share = share[: len(queries)]
        attended: Tensor = self._operations.paged_sparse_attention(
            queries,
            key_pages,
            value_pages,
            self._page_table,
            self._lengths,
            self._query_starts,
            max_query_tokens=self._width,
            key_rotary=self._key_rotary,
            page_attention=share,
            validate=self._validate,
        )
        if share is not None:
            self.received += share.unflatten(0, (-1, self._width)).sum((1, 2))
        return attended
