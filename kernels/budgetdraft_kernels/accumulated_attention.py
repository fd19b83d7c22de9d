"""The attention that each key has received, without ever storing a weight.

The first launch finds what the weights of each row, a query token's head, add up to.
The second computes them again and adds them up for each key. Nothing is added
atomically, so that equal arguments have equal results.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from budgetdraft_kernels import launch_settings
from budgetdraft_kernels.checks import check_accumulated_attention

#: Rows and keys per program: tensor cores take 16 at least, registers hold no more than
#: the logits of so many by so many.
MIN_TILE, MAX_TILE = 16, 64


@triton.jit
def loaded_rows(
    x,  # [tokens, heads, D]
    row,
    num_rows,
    kv_head,
    stride_token,
    stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """[rows, dims] of the ``GROUP`` heads of a KV head, a token's side by side."""
    head = kv_head * GROUP + row % GROUP
    rows = x + (row // GROUP).to(tl.int64) * stride_token + head * stride_head
    dim = tl.arange(0, DIM_BLOCK)
    mask = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0)


# What changes from prompt to prompt must not ask for another compilation.
@triton.jit(do_not_specialize=["num_queries", "num_keys", "split_keys"])
def row_lse_kernel(
    lse,  # [splits, G, T * H / G]
    queries,
    keys,
    logit_scale,
    num_queries,
    num_keys,
    split_keys,
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_rows = num_queries * GROUP
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    q = loaded_rows(
        queries,
        row,
        num_rows,
        kv_head,
        query_stride_token,
        query_stride_head,
        GROUP,
        HEAD_DIM,
        DIM_BLOCK,
    )
    seen = num_keys - num_queries + row // GROUP + 1  # keys that a row may look at

    highest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    first = split * split_keys
    last = tl.minimum(first + split_keys, tl.minimum(tl.max(seen, 0), num_keys))
    for tile in tl.range(first, last, TILE, num_stages=STAGES):
        key = tile + tl.arange(0, TILE)
        k = loaded_rows(
            keys,
            key,
            num_keys,
            kv_head,
            key_stride_token,
            key_stride_head,
            1,
            HEAD_DIM,
            DIM_BLOCK,
        )
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * logit_scale
        logits = tl.where(key[None, :] < seen[:, None], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen nothing yet keeps weights of zero instead of NaN.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - reference[:, None])
        total = total * tl.exp(highest - reference) + tl.sum(weights, 1)
        highest = higher

    part = (split * tl.num_programs(1) + kv_head) * num_rows
    tl.store(lse + part + row, highest + tl.log(total), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "split_rows"])
def received_kernel(
    received,  # [splits, G, S]
    lse,  # [G, T * H / G]
    queries,
    keys,
    logit_scale,
    num_queries,
    num_keys,
    split_rows,
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_rows = num_queries * GROUP
    first_key = tl.program_id(0) * TILE
    key = first_key + tl.arange(0, TILE)
    k = loaded_rows(
        keys,
        key,
        num_keys,
        kv_head,
        key_stride_token,
        key_stride_head,
        1,
        HEAD_DIM,
        DIM_BLOCK,
    )

    weights = tl.zeros([TILE], tl.float32)
    first = split * split_rows
    last = tl.minimum(first + split_rows, num_rows)
    # Rows before this one see none of these keys.
    first = tl.maximum(first, (first_key - (num_keys - num_queries)) * GROUP)
    for tile in tl.range(first, last, TILE, num_stages=STAGES):
        row = tile + tl.arange(0, TILE)
        q = loaded_rows(
            queries,
            row,
            num_rows,
            kv_head,
            query_stride_token,
            query_stride_head,
            GROUP,
            HEAD_DIM,
            DIM_BLOCK,
        )
        seen = num_keys - num_queries + row // GROUP + 1
        # A row behind the last weighs nothing.
        row_lse = tl.load(
            lse + kv_head * num_rows + row, mask=row < last, other=float("inf")
        )
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * logit_scale
        logits = tl.where(key[:, None] < seen[None, :], logits, float("-inf"))
        weights += tl.sum(tl.exp(logits - row_lse[None, :]), 1)

    part = (split * tl.num_programs(1) + kv_head) * num_keys
    tl.store(received + part + key, weights, mask=key < num_keys)


def accumulated_attention(
    queries: Tensor, keys: Tensor, *, validate: bool = True
) -> Tensor:
    """See ``reference.accumulated_attention``."""
    if validate:
        check_accumulated_attention(queries, keys)
    num_queries, num_heads, head_dim = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    new: dict[str, Any] = {"dtype": torch.float32, "device": keys.device}
    if not num_queries:
        return torch.zeros(num_kv_heads, num_keys, **new)
    group = num_heads // num_kv_heads
    num_rows = num_queries * group
    settings = launch_settings.settings_of(keys.device)
    element_bytes = keys.element_size()
    dim_block = max(16, triton.next_power_of_2(head_dim))
    tile = launch_settings.tile_rows(dim_block, element_bytes, keys.device)
    tile = min(max(tile, MIN_TILE), MAX_TILE)
    row_tiles, key_tiles = triton.cdiv(num_rows, tile), triton.cdiv(num_keys, tile)
    operands = (queries, keys, head_dim**-0.5, num_queries, num_keys)
    strides = (*queries.stride()[:2], *keys.stride()[:2])
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "DIM_BLOCK": dim_block,
        "TILE": tile,
        "STAGES": settings.attention_stages,
        "num_warps": launch_settings.warps(dim_block, element_bytes),
    }

    splits, split_tiles = _splits(row_tiles * num_kv_heads, key_tiles, keys.device)
    lse = torch.empty(splits, num_kv_heads, num_rows, **new)
    row_lse_kernel[(row_tiles, num_kv_heads, splits)](
        lse, *operands, split_tiles * tile, *strides, **constants
    )
    lse = lse.logsumexp(0)
    splits, split_tiles = _splits(key_tiles * num_kv_heads, row_tiles, keys.device)
    received = torch.empty(splits, num_kv_heads, num_keys, **new)
    received_kernel[(key_tiles, num_kv_heads, splits)](
        received, lse, *operands, split_tiles * tile, *strides, **constants
    )
    return received.sum(0)


def _splits(programs: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """In how many parts to go over the tiles, and how many of them are in a part."""
    splits = launch_settings.attention_splits(programs, tiles, device)
    split_tiles = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, split_tiles), split_tiles
