"""Attention of mask tokens over pages of the target's cache and each other."""

from types import ModuleType

import torch
from torch import Tensor

from budgetdraft_kernels.reference import rotate


class MaskAttention:
    """The ``attend`` of mask tokens, of which each request has one group.

    What they see of the cache is read by ``paged_sparse_attention``, which returns the
    logarithms of its sums; with these, attention within the group is merged in.
    """

    def __init__(
        self,
        operations: ModuleType,
        pages: list[tuple[Tensor, Tensor]],
        page_tables: list[Tensor],
        lengths: Tensor,
        rotary: tuple[Tensor, Tensor],
        block: int,
        *,
        validate: bool = False,
    ) -> None:
        """
        Args:
            operations: see ``select_operations``.
            pages: keys and values of each layer, [num_pages, P, G, D].
            page_tables: of each layer, [B, N] or [B, G, N].
            lengths: [B] int64, tokens in the pages of each request.
            rotary: cos and sin of the mask tokens' positions, [B * block, D] each.
            block: mask tokens of a request.
            validate: see ``paged_sparse_attention``.
        """
        self._operations, self._pages, self._tables = operations, pages, page_tables
        self._lengths, self._block, self._validate = lengths, block, validate
        self._rotary = [x[:, None] for x in rotary]
        count = len(lengths) + 1
        self._starts = block * torch.arange(count, device=lengths.device)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[B * block, H + 2 * G, D] to [B * block, H, D]."""
        key_pages, value_pages = self._pages[layer]
        num_kv_heads = key_pages.shape[2]
        q, k, v = qkv.split((qkv.shape[1] - 2 * num_kv_heads, *[num_kv_heads] * 2), 1)
        q, k = rotate(q, *self._rotary), rotate(k, *self._rotary)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        of_context = self._operations.paged_sparse_attention(
            q,
            key_pages,
            value_pages,
            self._tables[layer],
            self._lengths,
            self._starts,
            max_query_tokens=self._block,
            causal=False,
            lse=lse,
            validate=self._validate,
        )
        return merge_own(of_context, lse, q, k, v, self._block)


def merge_own(
    of_context: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block: int
) -> Tensor:
    """Attention to a context and to one's own block, as one softmax would have it.

    Args:
        of_context: [B * block, H, D], attention to the context alone.
        lse: [B * block, H] float32, see ``paged_sparse_attention``.
        q: [B * block, H, D].
        k, v: [B * block, G, D].

    Returns:
        [B * block, H, D].
    """
    group = q.shape[1] // k.shape[1]
    blocks = [x.unflatten(0, (-1, block)).transpose(1, 2).float() for x in (q, k, v)]
    q, k, v = blocks[0], *(x.repeat_interleave(group, 1) for x in blocks[1:])
    logits = q @ k.mT * q.shape[-1] ** -0.5  # [B, H, block, block]
    own_lse = logits.logsumexp(-1).transpose(1, 2).flatten(0, 1)
    own = (logits.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)
    share = torch.sigmoid(own_lse - lse)[..., None]  # 1 where there is no context
    return torch.lerp(of_context.float(), own, share).to(of_context.dtype)
