"""The operations in plain PyTorch.

Letters in shapes: B requests, W query tokens of each, H query heads, G KV heads,
D head size, N pages per request, P tokens per page.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (RoFormer, https://arxiv.org/abs/2104.09864), half-split form.

    Args:
        x: [..., num_heads, D].
        cos: [..., 1, D], the angles of both halves, as Hugging Face Llama has them.
        sin: [..., 1, D], with the first half negated.

    Returns:
        [..., num_heads, D].
    """
    half = x.shape[-1] // 2
    return x * cos + x.roll(half, -1) * sin


def paged_cache_write(
    keys: Tensor, values: Tensor, key_pages: Tensor, value_pages: Tensor, cells: Tensor
) -> None:
    """Stores keys and values in their cells of one layer's pages, in place.

    Args:
        keys, values: [B, W, G, D].
        key_pages, value_pages: [num_pages, P, G, D].
        cells: [B * W] int64, page * P + offset in the page.
    """
    shape = (-1, *key_pages.shape[2:])
    key_pages.view(shape).index_copy_(0, cells, keys.reshape(shape))
    value_pages.view(shape).index_copy_(0, cells, values.reshape(shape))


def paged_sparse_attention(
    queries: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Attention of each request's queries over the pages that it holds.

    Args:
        queries: [B, W, H, D]; H is a multiple of G.
        key_pages, value_pages: [num_pages, P, G, D].
        page_table: [B, N] int64.
        lengths: [B, W] int64, how many tokens, in the order of the page table, each
            query may look at.

    Returns:
        [B, W, H, D].
    """
    num_requests, width, num_heads, head_dim = queries.shape
    num_kv_heads = key_pages.shape[2]

    num_cells = page_table.shape[1] * key_pages.shape[1]
    held = page_table.view(-1)

    def gather(pages: Tensor) -> Tensor:
        shape = (num_requests, num_cells, num_kv_heads, head_dim)
        return pages.index_select(0, held).view(shape).transpose(1, 2)

    # The query heads that share a KV head become rows of one product: [B, G, rows, D],
    # a query token's heads side by side.
    rows = (
        queries.reshape(num_requests, width, num_kv_heads, -1, head_dim)
        .transpose(1, 2)
        .reshape(num_requests, num_kv_heads, -1, head_dim)
    )
    visible = torch.arange(num_cells, device=lengths.device) < lengths[..., None]
    if width > 1:
        visible = visible.repeat_interleave(num_heads // num_kv_heads, dim=1)
    out = F.scaled_dot_product_attention(
        rows, gather(key_pages), gather(value_pages), attn_mask=visible[:, None]
    )
    if width > 1:
        grouped = (num_requests, num_kv_heads, width, -1, head_dim)
        out = out.view(grouped).transpose(1, 2)
    return out.reshape(queries.shape)
