"""Scores of a prompt's chunks, in one pass over its keys."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from budgetdraft_kernels import launch_settings
from budgetdraft_kernels.checks import check_chunk_scores

#: Queries per program: as many as tensor cores take at least.
QUERY_BLOCK = 16


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_queries", "num_chunks"])
def chunk_scores_kernel(
    scores,  # [L, G, num_heads * num_queries, num_chunks]
    keys,
    queries,
    logit_scale,
    num_tokens,
    num_heads,
    num_queries,
    num_chunks,
    key_stride_layer,
    key_stride_head,
    key_stride_token,
    query_stride_layer,
    query_stride_kv_head,
    query_stride_head,
    query_stride_token,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    layer, kv_head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    dim = tl.arange(0, DIM_BLOCK)
    in_dim = (dim < HEAD_DIM)[None, :]

    lane = tl.arange(0, TILE_CHUNKS * CHUNK_BLOCK)
    chunk = tl.program_id(1) * TILE_CHUNKS + lane // CHUNK_BLOCK
    within = lane % CHUNK_BLOCK
    token = chunk * CHUNK_SIZE + within
    present = (within < CHUNK_SIZE) & (token < num_tokens)
    key_rows = keys + layer * key_stride_layer + kv_head * key_stride_head
    key_rows += token.to(tl.int64) * key_stride_token
    k = tl.load(
        key_rows[:, None] + dim[None, :], mask=present[:, None] & in_dim, other=0.0
    )

    query = tl.program_id(2) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    in_queries = query < num_heads * num_queries
    query_rows = queries + layer * query_stride_layer + kv_head * query_stride_kv_head
    query_rows += (query // num_queries) * query_stride_head
    query_rows += (query % num_queries) * query_stride_token
    q = tl.load(
        query_rows[:, None] + dim[None, :],
        mask=in_queries[:, None] & in_dim,
        other=0.0,
    )
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * logit_scale
    shape: tl.constexpr = (QUERY_BLOCK, TILE_CHUNKS, CHUNK_BLOCK)
    if LOG_SUM_EXP:
        own = num_tokens - num_queries + query % num_queries
        seen = present[None, :] & (token[None, :] <= own[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        by_chunk = tl.reshape(logits, shape)
        highest = tl.max(by_chunk, 2)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        reduced = tl.log(tl.sum(tl.exp(by_chunk - highest[:, :, None]), 2)) + highest
    else:
        by_chunk = tl.reshape(tl.where(present[None, :], logits, 0.0), shape)
        counts = tl.reshape(present.to(tl.float32), (TILE_CHUNKS, CHUNK_BLOCK))
        reduced = tl.sum(by_chunk, 2) / tl.maximum(tl.sum(counts, 1), 1.0)[None, :]

    chunks = tl.program_id(1) * TILE_CHUNKS + tl.arange(0, TILE_CHUNKS)
    lanes = (row * num_heads * num_queries + query)[:, None] * num_chunks
    lanes += chunks[None, :]
    mask = in_queries[:, None] & (chunks < num_chunks)[None, :]
    tl.store(scores + lanes, reduced, mask=mask)


def chunk_scores(
    keys: Tensor,
    queries: Tensor,
    chunk_size: int,
    score: Literal["mean_key", "attention"],
) -> Tensor:
    """See ``reference.chunk_scores``."""
    check_chunk_scores(keys, queries, chunk_size, score)
    num_layers, num_kv_heads, num_tokens, head_dim = keys.shape
    num_heads, num_queries = queries.shape[2:4]
    num_chunks = triton.cdiv(num_tokens, chunk_size)
    chunk_block = triton.next_power_of_2(chunk_size)
    settings = launch_settings.settings_of(keys.device)
    tile_chunks = max(1, settings.chunk_scores_tokens // chunk_block)
    scores = torch.empty(
        (num_layers, num_kv_heads, num_heads * num_queries, num_chunks),
        dtype=torch.float32,
        device=keys.device,
    )
    grid = (
        num_layers * num_kv_heads,
        triton.cdiv(num_chunks, tile_chunks),
        triton.cdiv(num_heads * num_queries, QUERY_BLOCK),
    )
    dim_block = max(16, triton.next_power_of_2(head_dim))
    by_attention = score == "attention"
    chunk_scores_kernel[grid](
        scores,
        keys,
        queries,
        head_dim**-0.5 if by_attention else 1.0,
        num_tokens,
        num_heads,
        num_queries,
        num_chunks,
        *keys.stride()[:3],
        *queries.stride()[:4],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        CHUNK_SIZE=chunk_size,
        CHUNK_BLOCK=chunk_block,
        TILE_CHUNKS=tile_chunks,
        QUERY_BLOCK=QUERY_BLOCK,
        LOG_SUM_EXP=by_attention,
        num_warps=launch_settings.warps(dim_block, keys.element_size()),
    )
    return (scores.softmax(-1) if by_attention else scores).mean(-2)
