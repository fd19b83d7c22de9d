"""Inputs of the operations, as a draft step has them, and the bytes they must move.

Values are normal random numbers, drawn from a fixed seed; page tables are random
permutations over a pool. On a GPU there are enough input sets that by the time one is
used again the cache has been filled with others.

Letters in shapes are those of ``budgetdraft_kernels.reference``.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.micro.timing import cache_bytes

ON_GPU = torch.cuda.is_available()
PAGE_SIZE = 16
SEED = 0
#: All input sets together are so many times what the cache holds.
ROTATED_CACHES = 4

Inputs = dict[str, Any]


@dataclass(frozen=True)
class ModelShape:
    """What of a model the operations see."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Key and value of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-68m", 12, 12, 64, num_layers=2, vocab_size=32000),
        ModelShape("gqa-32-8", 32, 8, 128, num_layers=4, vocab_size=128256),
    )
}


@dataclass(frozen=True)
class Workload:
    """One operation's inputs.

    Attributes:
        sets: named arguments, one dict for each call in turn.
        moved_bytes: fewest bytes that one call reads and writes.
    """

    sets: Sequence[Inputs]
    moved_bytes: int

    @property
    def device(self) -> torch.device:
        tensors = (x for x in self.sets[0].values() if isinstance(x, Tensor))
        return next(tensors).device

    def calls(self, kernel: Callable[..., Any], **options: Any) -> list[Callable]:
        """One call of ``kernel`` for each set."""
        return [partial(kernel, **inputs, **options) for inputs in self.sets]


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A function that makes the next of ``calls`` each time it is called."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def in_a_row(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """A function that makes all of ``calls``.

    A graph of it has every input set in it; of ``in_turn``, it may have so few that the
    cache holds them from one replay to the next.
    """

    def run() -> None:
        for call in calls:
            call()

    return run


def draft_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def attention(
    shape: ModelShape,
    batch: int,
    budget: int,
    device: torch.device,
    *,
    pool_tokens: int = 0,
) -> Workload:
    """Of ``paged_sparse_attention``: one query token each, all of the budget held.

    Args:
        budget: tokens of each request, a multiple of the page size.
        pool_tokens: tokens that the pool has room for at least.
    """
    assert budget % PAGE_SIZE == 0, (budget, PAGE_SIZE)
    dtype = draft_dtype(device)
    torch.manual_seed(SEED)
    query_bytes = batch * shape.num_heads * shape.head_dim * dtype.itemsize
    moved_bytes = batch * budget * shape.token_bytes(dtype) + 2 * query_bytes
    num_sets = _num_sets(moved_bytes, device)
    held = budget // PAGE_SIZE
    needed = num_sets * batch * held
    num_pages = max(needed, -(-pool_tokens // PAGE_SIZE))
    key_pages, value_pages = _pages(shape, num_pages, device)
    # int64, as the drafter's page tables are.
    tables = torch.randperm(num_pages, device=device)[:needed]
    lengths = torch.full((batch,), budget, device=device)
    sets = [
        {
            "queries": normal(batch, shape.num_heads, shape.head_dim, device=device),
            "key_pages": key_pages,
            "value_pages": value_pages,
            "page_table": page_table,
            "lengths": lengths,
            "query_starts": torch.arange(batch + 1, device=device),
            "max_query_tokens": 1,
        }
        for page_table in tables.view(num_sets, batch, held)
    ]
    return Workload(sets, moved_bytes)


def cache_write(shape: ModelShape, num_tokens: int, device: torch.device) -> Workload:
    """Of ``paged_cache_write``, to cells all over a pool of twice the tokens."""
    dtype = draft_dtype(device)
    torch.manual_seed(SEED)
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    row_bytes = shape.head_dim * dtype.itemsize
    # Queries, keys and values are read and written; cos and sin are read.
    moved_bytes = num_tokens * (2 * num_heads * row_bytes + 2 * row_bytes + 8)
    num_sets = _num_sets(moved_bytes, device)
    num_pages = -(-2 * num_sets * num_tokens // PAGE_SIZE)
    key_pages, value_pages = _pages(shape, num_pages, device)
    cells = torch.randperm(num_pages * PAGE_SIZE, device=device)
    sets = []
    for cells_of_set in cells[: num_sets * num_tokens].view(num_sets, num_tokens):
        positions = torch.randint(1 << 17, (num_tokens,), device=device)
        cos, sin = angles(positions, shape.head_dim)
        sets.append(
            {
                "qkv": normal(num_tokens, num_heads, shape.head_dim, device=device),
                "cos": cos,
                "sin": sin,
                "key_pages": key_pages,
                "value_pages": value_pages,
                "cells": cells_of_set,
            }
        )
    return Workload(sets, moved_bytes)


def linear(shape: ModelShape, num_tokens: int, device: torch.device) -> Workload:
    """Of ``linear``: a layer's gate and up with the norm before them."""
    torch.manual_seed(SEED)
    hidden = shape.num_heads * shape.head_dim
    inner = 4 * hidden
    numbers = 2 * inner * hidden + hidden + num_tokens * (hidden + inner)
    moved_bytes = numbers * draft_dtype(device).itemsize
    sets = [
        {
            "x": normal(num_tokens, hidden, device=device),
            "weight": normal(2 * inner, hidden, device=device) * hidden**-0.5,
            "norm": normal(hidden, device=device),
            "eps": 1e-5,
            "gated": True,
        }
        for _ in range(_num_sets(moved_bytes, device))
    ]
    return Workload(sets, moved_bytes)


def chunk_scores(
    shape: ModelShape,
    num_tokens: int,
    device: torch.device,
    *,
    num_queries: int = 1,
    chunk_size: int = 16,
) -> Workload:
    """Of ``chunk_scores``, over a prompt whose keys lie token after token."""
    torch.manual_seed(SEED)
    num_chunks = -(-num_tokens // chunk_size)
    heads = shape.num_layers * shape.num_kv_heads
    element_bytes = draft_dtype(device).itemsize
    moved_bytes = heads * shape.head_dim * element_bytes * (num_tokens + num_queries)
    moved_bytes += heads * num_chunks * torch.float32.itemsize
    sizes = (shape.num_layers, num_tokens, shape.num_kv_heads, shape.head_dim)
    heads_of_all = (shape.num_layers, shape.num_kv_heads, 1)
    query_sizes = (*heads_of_all, num_queries, shape.head_dim)
    sets = [
        {
            "keys": normal(*sizes, device=device).transpose(1, 2),
            "queries": normal(*query_sizes, device=device),
            "chunk_size": chunk_size,
        }
        for _ in range(_num_sets(moved_bytes, device))
    ]
    return Workload(sets, moved_bytes)


def page_compaction(
    shape: ModelShape, num_tokens: int, num_kept: int, device: torch.device
) -> Workload:
    """Of ``page_compaction``: each head keeps other tokens, in order.

    Sets share prompts where fewer fill the cache.
    """
    torch.manual_seed(SEED)
    rows = shape.num_layers * num_kept
    # Read and written; which, for each head, and where to.
    moved_bytes = 2 * rows * shape.token_bytes(draft_dtype(device))
    moved_bytes += 8 * (rows * shape.num_kv_heads + num_kept)
    sizes = (shape.num_layers, num_tokens, shape.num_kv_heads, shape.head_dim)
    prompt_bytes = (
        shape.num_layers * num_tokens * shape.token_bytes(draft_dtype(device))
    )
    prompts = [
        {"keys": normal(*sizes, device=device), "values": normal(*sizes, device=device)}
        for _ in range(_num_sets(prompt_bytes, device))
    ]
    num_pages = -(-2 * num_kept // PAGE_SIZE)
    sets = []
    for index in range(_num_sets(moved_bytes, device)):
        chance = torch.rand(
            shape.num_layers, shape.num_kv_heads, num_tokens, device=device
        )
        key_pages, value_pages = _pages(shape, num_pages, device, shape.num_layers)
        sets.append(
            prompts[index % len(prompts)]
            | {
                "kept": chance.topk(num_kept).indices.sort().values,
                "key_pages": key_pages,
                "value_pages": value_pages,
                "cells": torch.randperm(num_pages * PAGE_SIZE, device=device)[
                    :num_kept
                ],
            }
        )
    return Workload(sets, moved_bytes)


def token_picks(
    shape: ModelShape, batch: int, device: torch.device, *, sampled: bool
) -> Workload:
    """Of ``sampled_pick`` if ``sampled``, of ``greedy_pick`` otherwise."""
    torch.manual_seed(SEED)
    count = batch * shape.vocab_size
    moved_bytes = count * draft_dtype(device).itemsize
    if sampled:
        moved_bytes += count * torch.float32.itemsize  # the distribution
    sets: list[Inputs] = []
    for _ in range(_num_sets(moved_bytes, device)):
        sets.append({"logits": normal(batch, shape.vocab_size, device=device)})
        if sampled:
            temperatures = torch.rand(batch, device=device) + 0.5
            uniforms = torch.rand(batch, device=device)
            sets[-1] |= {"temperatures": temperatures, "uniforms": uniforms}
    return Workload(sets, moved_bytes)


def angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [T], each [T, D], as ``reference.rotate`` takes them."""
    half = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angle = positions[:, None] / 10000.0**half
    dtype = draft_dtype(positions.device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _num_sets(moved_bytes: int, device: torch.device) -> int:
    return max(1, -(-ROTATED_CACHES * cache_bytes(device) // moved_bytes))


def normal(*sizes: int, device: torch.device) -> Tensor:
    return torch.randn(sizes, dtype=draft_dtype(device), device=device)


def _pages(
    shape: ModelShape,
    num_pages: int,
    device: torch.device,
    num_layers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values, [num_pages, P, G, D] or with layers in front."""
    layers = () if num_layers is None else (num_layers,)
    sizes = (*layers, num_pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
    return normal(*sizes, device=device), normal(*sizes, device=device)
