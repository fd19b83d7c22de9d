"""Norms, rotary embedding and the write to the pages, in one pass over projections."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from budgetdraft_kernels import launch_settings
from budgetdraft_kernels.checks import check_cache_write
from budgetdraft_kernels.reference_projections import Norms
from budgetdraft_kernels.storage import to_storage


@triton.jit
def normed(x, scale, query_norm, key_norm, half, HALF: tl.constexpr, is_query, is_key):
    """Halves of heads [heads, half]; those of queries and keys have norms."""
    q = tl.load(query_norm + half, mask=half < HALF, other=0.0).to(tl.float32)
    k = tl.load(key_norm + half, mask=half < HALF, other=0.0).to(tl.float32)
    norm = tl.where(is_query[:, None], q[None, :], k[None, :])
    y = (x.to(tl.float32) * scale[:, None] * norm).to(x.dtype)
    return tl.where((is_query | is_key)[:, None], y, x)


@triton.jit(do_not_specialize=["num_cells"], do_not_specialize_on_alignment=["cells"])
def cache_write_kernel(
    queries,  # [T, H, D]
    key_cells,  # [num_cells, G, D]
    value_cells,
    qkv,
    cos,
    sin,
    cells,
    query_norm,  # [D], or None
    key_norm,
    eps,
    key_scale,
    value_scale,
    num_cells,
    qkv_stride_token,
    qkv_stride_head,
    rotary_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    ROTATE_KEYS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    half = tl.arange(0, HALF_BLOCK)
    HALF: tl.constexpr = HEAD_DIM // 2
    in_half = (half < HALF)[None, :]
    is_query = head < NUM_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS) & (
        head < NUM_HEADS + 2 * NUM_KV_HEADS
    )
    is_rotated = is_query | is_key if ROTATE_KEYS else is_query

    rows = qkv + token * qkv_stride_token + head * qkv_stride_head
    lanes = rows[:, None] + half[None, :]
    mask = (is_query | is_key | is_value)[:, None] & in_half
    low = tl.load(lanes, mask=mask, other=0.0)
    high = tl.load(lanes + HALF, mask=mask, other=0.0)
    if query_norm is not None:
        squares = tl.sum(low.to(tl.float32) * low.to(tl.float32), 1)
        squares += tl.sum(high.to(tl.float32) * high.to(tl.float32), 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        low = normed(low, scale, query_norm, key_norm, half, HALF, is_query, is_key)
        high_norms = query_norm + HALF, key_norm + HALF
        high = normed(high, scale, *high_norms, half, HALF, is_query, is_key)
    # Both halves have the same angles; the second one's sine is not negated.
    angle = token * rotary_stride + half
    c = tl.load(cos + angle, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle + HALF, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    turned_low = low.to(tl.float32) * c - high.to(tl.float32) * s
    turned_high = high.to(tl.float32) * c + low.to(tl.float32) * s
    low = tl.where(is_rotated[:, None], turned_low.to(low.dtype), low)
    high = tl.where(is_rotated[:, None], turned_high.to(high.dtype), high)

    query_lanes = (token * NUM_HEADS + head)[:, None] * HEAD_DIM + half[None, :]
    query_mask = is_query[:, None] & in_half
    tl.store(queries + query_lanes, low, mask=query_mask)
    tl.store(queries + query_lanes + HALF, high, mask=query_mask)

    cell = tl.load(cells + token + tl.zeros([HEADS_BLOCK], tl.int64))
    inside = (cell >= 0) & (cell < num_cells)
    kv_head = tl.where(is_key, head - NUM_HEADS, head - NUM_HEADS - NUM_KV_HEADS)
    cell_lanes = (cell * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + half[None, :]
    key_mask = (is_key & inside)[:, None] & in_half
    value_mask = (is_value & inside)[:, None] & in_half
    stored = to_storage(low, key_scale, kv_head, is_key, key_cells)
    tl.store(key_cells + cell_lanes, stored, mask=key_mask)
    stored = to_storage(high, key_scale, kv_head, is_key, key_cells)
    tl.store(key_cells + cell_lanes + HALF, stored, mask=key_mask)
    stored = to_storage(low, value_scale, kv_head, is_value, value_cells)
    tl.store(value_cells + cell_lanes, stored, mask=value_mask)
    stored = to_storage(high, value_scale, kv_head, is_value, value_cells)
    tl.store(value_cells + cell_lanes + HALF, stored, mask=value_mask)


def paged_cache_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    cells: Tensor,
    *,
    rotate_keys: bool = True,
    norms: Norms = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """See ``reference.paged_cache_write``."""
    if validate:
        check_cache_write(
            qkv, cos, sin, key_pages, value_pages, cells, norms, key_scale, value_scale
        )
    num_tokens, all_heads, head_dim = qkv.shape
    num_pages, page_size, num_kv_heads, _ = key_pages.shape
    num_heads = all_heads - 2 * num_kv_heads
    queries = torch.empty(
        (num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device
    )
    settings = launch_settings.settings_of(qkv.device)
    heads_block = min(triton.next_power_of_2(all_heads), settings.cache_write_heads)
    if num_tokens:
        cache_write_kernel[(num_tokens, triton.cdiv(all_heads, heads_block))](
            queries,
            key_pages,
            value_pages,
            qkv,
            cos,
            sin,
            cells,
            *(norms or (None, None, 0.0)),
            key_scale,
            value_scale,
            num_pages * page_size,
            *qkv.stride()[:2],
            cos.stride(0),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
            HEADS_BLOCK=heads_block,
            ROTATE_KEYS=rotate_keys,
        )
    return queries
