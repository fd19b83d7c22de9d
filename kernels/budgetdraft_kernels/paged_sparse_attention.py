"""Split-KV attention over pages (Flash-Decoding's scheme), for a few query tokens.

The query heads that share a KV head, and all query tokens of a request, are rows of one
tile, so that each page is read once. The launch grid comes from capacities alone; what
a request holds is read on the device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from budgetdraft_kernels import launch_settings
from budgetdraft_kernels.checks import check_attention
from budgetdraft_kernels.launch_settings import MAX_SPLITS

LOG2_E = 1.4426950408889634
#: Rows and tokens per program: tensor cores take 16 at least, registers hold no more
#: than so many rows and addresses of tokens.
MIN_ROWS, MAX_ROW_BYTES, MAX_TOKENS = 16, 128, 128


@triton.jit
def rotated_logits(q_low, q_high, keys, cos, sin, mask, HALF: tl.constexpr):
    """Logits of query halves [rows, dims] and keys that are rotated when read.

    ``keys``, ``cos`` and ``sin`` point to the low halves, [tokens, dims].
    """
    k_low = tl.load(keys, mask=mask, other=0.0).to(tl.float32)
    k_high = tl.load(keys + HALF, mask=mask, other=0.0).to(tl.float32)
    # Both halves have the same angles; the second one's sine is not negated.
    c = tl.load(cos, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + HALF, mask=mask, other=0.0).to(tl.float32)
    low = (k_low * c - k_high * s).to(q_low.dtype)
    high = (k_high * c + k_low * s).to(q_low.dtype)
    logits = tl.dot(q_low, tl.trans(low), input_precision="ieee")
    return tl.dot(q_high, tl.trans(high), logits, input_precision="ieee")


# What changes from call to call must not ask for another compilation.
@triton.jit(
    do_not_specialize=["num_pages", "num_held", "num_splits", "split_pages"],
    do_not_specialize_on_alignment=["lengths", "query_starts"],
)
def attention_kernel(
    out,  # [T, H, num_splits, D]
    lse,  # [T, H, num_splits], base 2
    page_lse,  # [T, H, N] base 2, or None
    queries,
    key_pages,
    value_pages,
    page_table,
    lengths,
    query_starts,
    key_scale,
    value_scale,
    cos,
    sin,
    logit_scale,
    num_pages,
    num_held,
    num_splits,
    split_pages,
    query_stride_token,
    query_stride_head,
    page_stride,
    cell_stride,
    kv_head_stride,
    table_stride_request,
    table_stride_head,
    rotary_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_BLOCK: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    request = tl.program_id(0) // ROW_BLOCKS
    row_block = tl.program_id(0) % ROW_BLOCKS
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    query_start = tl.load(query_starts + request).to(tl.int64)
    num_queries = (tl.load(query_starts + request + 1) - query_start).to(tl.int32)
    if row_block * ROW_BLOCK >= num_queries * GROUP:
        return
    length = tl.minimum(tl.load(lengths + request), num_held * PAGE_SIZE).to(tl.int32)

    row = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_exists = row < num_queries * GROUP
    token = query_start + row // GROUP
    head = kv_head * GROUP + row % GROUP
    token_head = token * (tl.num_programs(1) * GROUP) + head
    seen = length + row * 0  # tokens that a row may look at
    if CAUSAL:
        seen += row // GROUP + 1 - num_queries
    query_rows = queries + token * query_stride_token + head * query_stride_head
    dim = tl.arange(0, DIM_BLOCK)
    row_mask = row_exists[:, None] & (dim < HEAD_DIM)[None, :]

    # Keys that are rotated when read are read in halves, queries along with them.
    HALF: tl.constexpr = HEAD_DIM // 2
    half = tl.arange(0, DIM_BLOCK // 2)
    in_half = half < HALF
    if cos is None:
        q = tl.load(query_rows[:, None] + dim[None, :], mask=row_mask, other=0.0)
        compute_type = q.dtype
    else:
        half_mask = row_exists[:, None] & in_half[None, :]
        half_rows = query_rows[:, None] + half[None, :]
        q_low = tl.load(half_rows, mask=half_mask, other=0.0)
        q_high = tl.load(half_rows + HALF, mask=half_mask, other=0.0)
        compute_type = q_low.dtype

    if key_scale is not None:
        logit_scale *= tl.load(key_scale + kv_head)
    table = page_table + request.to(tl.int64) * table_stride_request
    table += kv_head * table_stride_head
    head_offset = kv_head.to(tl.int64) * kv_head_stride

    highest = tl.full([ROW_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([ROW_BLOCK], tl.float32)
    attended = tl.zeros([ROW_BLOCK, DIM_BLOCK], tl.float32)
    lane = tl.arange(0, TILE_PAGES * PAGE_BLOCK)
    first = split * split_pages
    last = tl.minimum(first + split_pages, tl.cdiv(length, PAGE_SIZE))
    within = lane % PAGE_BLOCK
    held = first + lane // PAGE_BLOCK
    # A tile's page numbers are read during the tile before, for the compiler fetches
    # tiles ahead only if their addresses are known.
    page = tl.load(table + held, mask=held < last, other=0)
    for tile in tl.range(first, last, TILE_PAGES, num_stages=STAGES):
        held = tile + lane // PAGE_BLOCK
        index = held * PAGE_SIZE + within
        present = (held < last) & (within < PAGE_SIZE) & (index < length)
        present &= (page >= 0) & (page < num_pages)
        cell = page.to(tl.int64) * page_stride + within * cell_stride + head_offset

        held += TILE_PAGES
        page = tl.load(table + held, mask=held < last, other=0)

        if cos is None:
            k = tl.load(
                key_pages + cell[:, None] + dim[None, :],
                mask=present[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            ).to(compute_type)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            logits = rotated_logits(
                q_low,
                q_high,
                key_pages + cell[:, None] + half[None, :],
                cos + index[:, None] * rotary_stride + half[None, :],
                sin + index[:, None] * rotary_stride + half[None, :],
                present[:, None] & in_half[None, :],
                HALF,
            )

        visible = present[None, :] & (index[None, :] < seen[:, None])
        logits = tl.where(visible, logits * logit_scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen nothing yet keeps weights of zero instead of NaN.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - reference[:, None])
        decay = tl.exp2(highest - reference)
        total = total * decay + tl.sum(weights, 1)
        highest = higher

        v = tl.load(
            value_pages + cell[:, None] + dim[None, :],
            mask=present[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        ).to(compute_type)
        attended = attended * decay[:, None]
        attended = tl.dot(weights.to(compute_type), v, attended, input_precision="ieee")

        if page_lse is not None:
            by_page = tl.reshape(weights, (ROW_BLOCK, TILE_PAGES, PAGE_BLOCK))
            page_total = tl.log2(tl.sum(by_page, 2)) + reference[:, None]
            pages = tile + tl.arange(0, TILE_PAGES)
            tl.store(
                page_lse + (token_head * num_held)[:, None] + pages[None, :],
                page_total,
                mask=row_exists[:, None] & (pages < last)[None, :],
            )

    attended = attended / tl.where(total == 0.0, 1.0, total)[:, None]
    if value_scale is not None:
        attended *= tl.load(value_scale + kv_head)
    part = token_head * num_splits + split
    tl.store(
        out + (part * HEAD_DIM)[:, None] + dim[None, :],
        attended.to(out.dtype.element_ty),
        mask=row_mask,
    )
    tl.store(lse + part, highest + tl.log2(total), mask=row_exists)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    out,  # [T, H, D]
    lse,  # [T, H], base 2
    partial_out,  # [T, H, num_splits, D]
    partial_lse,  # [T, H, num_splits], base 2
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * NUM_HEADS + tl.program_id(1)
    split = tl.arange(0, SPLIT_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    exists = split < num_splits
    parts = tl.load(
        partial_lse + row * num_splits + split, mask=exists, other=float("-inf")
    )
    highest = tl.max(parts, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(parts - highest)
    total = tl.sum(weights, 0)
    values = tl.load(
        partial_out + (row * num_splits + split)[:, None] * HEAD_DIM + dim[None, :],
        mask=exists[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out + row * HEAD_DIM + dim,
        merged.to(out.dtype.element_ty),
        mask=dim < HEAD_DIM,
    )
    tl.store(lse + row, highest + tl.log2(total))


def paged_sparse_attention(
    queries: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    *,
    max_query_tokens: int,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_rotary: tuple[Tensor, Tensor] | None = None,
    page_attention: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """See ``reference.paged_sparse_attention``."""
    if validate:
        check_attention(
            queries,
            key_pages,
            value_pages,
            page_table,
            lengths,
            query_starts,
            max_query_tokens,
            key_scale,
            value_scale,
            key_rotary,
            page_attention,
            lse,
            causal,
        )
    if not len(queries):
        return torch.empty_like(queries)
    cos, sin = key_rotary or (None, None)
    num_tokens, num_heads, head_dim = queries.shape
    num_pages, page_size, num_kv_heads, _ = key_pages.shape
    num_requests, num_held = lengths.shape[0], page_table.shape[-1]
    group = num_heads // num_kv_heads
    settings = launch_settings.settings_of(queries.device)
    dim_block = max(32, triton.next_power_of_2(head_dim))
    page_block = triton.next_power_of_2(page_size)
    element_bytes = queries.element_size()
    tile_tokens = launch_settings.tile_rows(dim_block, element_bytes, queries.device)
    tile_pages = max(1, min(max(tile_tokens, MIN_ROWS), MAX_TOKENS) // page_block)
    rows = max_query_tokens * group
    max_rows = MAX_ROW_BYTES // element_bytes
    row_block = min(max(triton.next_power_of_2(rows), MIN_ROWS), max_rows)
    row_blocks = triton.cdiv(rows, row_block)

    tiles = triton.cdiv(num_held, tile_pages)
    programs = num_requests * row_blocks * num_kv_heads
    splits = launch_settings.attention_splits(programs, tiles, queries.device)
    split_pages = triton.cdiv(tiles, splits) * tile_pages
    splits = triton.cdiv(num_held, split_pages)

    out = queries.new_empty(queries.shape)
    new: dict[str, Any] = {"dtype": torch.float32, "device": queries.device}
    wants_lse = lse is not None
    if lse is None:
        lse = torch.empty(num_tokens, num_heads, **new)
    if page_attention is not None:
        page_attention.fill_(-torch.inf)  # logarithms first, shares in the end
    parts, parts_lse = out, lse
    if splits > 1:
        parts = torch.empty(num_tokens, num_heads, splits, head_dim, **new)
        parts_lse = torch.empty(num_tokens, num_heads, splits, **new)
    attention_kernel[(num_requests * row_blocks, num_kv_heads, splits)](
        parts,
        parts_lse,
        page_attention,
        queries,
        key_pages,
        value_pages,
        page_table,
        lengths,
        query_starts,
        key_scale,
        value_scale,
        cos,
        sin,
        (head_dim**-0.5 if scale is None else scale) * LOG2_E,
        num_pages,
        num_held,
        splits,
        split_pages,
        *queries.stride()[:2],
        *key_pages.stride()[:3],
        page_table.stride(0),
        page_table.stride(1) if page_table.ndim == 3 else 0,
        cos.stride(0) if cos is not None else 0,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        PAGE_SIZE=page_size,
        PAGE_BLOCK=page_block,
        TILE_PAGES=tile_pages,
        ROW_BLOCK=row_block,
        ROW_BLOCKS=row_blocks,
        CAUSAL=causal,
        # Angles take the room of one more stage.
        STAGES=settings.attention_stages if cos is None else 2,
        num_warps=launch_settings.warps(dim_block, element_bytes),
    )
    if splits > 1:
        merge_kernel[(num_tokens, num_heads)](
            out,
            lse,
            parts,
            parts_lse,
            splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM_BLOCK=dim_block,
            SPLIT_BLOCK=MAX_SPLITS,
        )
    if page_attention is not None:
        # A row that sees nothing has -inf - -inf here.
        page_attention.sub_(lse[..., None]).exp2_().nan_to_num_(0.0)
    if wants_lse:
        lse.div_(LOG2_E)  # to base e
    return out
