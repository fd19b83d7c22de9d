"""Calls of attention over pages, in a pool that is NaN wherever nobody may look."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
#: Pages of NaN before and behind the pool: what a kernel sees that reads outside.
MARGIN = 2
#: What page tables hold where nobody reads them.
GARBAGE = (-1, 10**9)
#: What ``page_attention`` holds before: a kernel may take NaN for a row that sees
#: nothing.
UNWRITTEN = 7.0


@dataclass(frozen=True)
class Case:
    """Sizes and layouts of one call."""

    lengths: tuple[int, ...] = (1, 63, 100, 0, 128)
    tokens: int | tuple[int, ...] = 1
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 16
    spare_pages: int = 1
    dtype: torch.dtype = torch.float32
    key_type: torch.dtype | None = None
    value_type: torch.dtype | None = None
    page_list_per_head: bool = False
    shared_pages: bool = False
    key_rotary: bool = False
    page_attention: bool = False
    causal: bool = True
    lse: bool = False
    scale: float | None = None
    max_tokens: int | None = None
    table_type: torch.dtype = torch.int64
    length_type: torch.dtype = torch.int64
    queries_of_qkv: bool = False
    heads_first: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        if isinstance(self.tokens, tuple):
            return self.tokens
        return (self.tokens,) * len(self.lengths)


BF16, FP16 = torch.bfloat16, torch.float16
EDGES = (0, 1, 15, 16, 17, 31, 33, 48)  # of pages of 16

CASES = {
    "decode": Case(),
    "edges_of_pages": Case(EDGES, head_dim=32, spare_pages=0, page_attention=True),
    "one_request_of_one_token": Case((1,), spare_pages=0),
    "full_capacity": Case((64, 64), tokens=2, spare_pages=0, page_attention=True),
    "empty_requests": Case((0, 0), tokens=(3, 0), page_attention=True),
    "no_queries_for_some": Case((100, 63, 5), tokens=(0, 2, 0)),
    "two_tokens": Case((2, 63, 100, 128), tokens=2, page_attention=True),
    "ragged": Case((1, 63, 100, 5, 40), tokens=(1, 4, 7, 5, 0), max_tokens=9),
    "prompt_of_32": Case((32, 100, 31), tokens=(32, 32, 31), group=1, head_dim=32),
    "rows_beyond_a_block": Case(
        (64, 100, 0), tokens=(32, 3, 1), group=8, head_dim=32, page_attention=True
    ),
    "group_1": Case(group=1, kv_heads=3, head_dim=32),
    "group_2": Case(group=2, kv_heads=1, tokens=(1, 5, 2, 0, 3)),
    "group_3": Case(group=3, kv_heads=3, tokens=(1, 6, 2, 1, 3), page_attention=True),
    "group_16": Case(group=16, kv_heads=1, head_dim=32, tokens=(1, 1, 5, 0, 2)),
    "head_dim_10": Case(head_dim=10, page_attention=True),
    "head_dim_80": Case(head_dim=80),
    "head_dim_96_bf16": Case(head_dim=96, dtype=BF16),
    "head_dim_128_bf16": Case(head_dim=128, dtype=BF16, page_attention=True),
    "head_dim_128_fp16": Case(head_dim=128, dtype=FP16, tokens=(1, 2, 3, 1, 4)),
    "head_dim_256": Case((17, 40), head_dim=256, tokens=2),
    "head_dim_256_bf16": Case((1, 40), head_dim=256, dtype=BF16),
    "pages_of_1": Case((1, 20, 33, 0), page_size=1, page_attention=True),
    "pages_of_7": Case((1, 63, 100, 0, 7, 8), page_size=7, page_attention=True),
    "pages_of_8": Case(page_size=8, dtype=BF16),
    "pages_of_24": Case((1, 63, 100, 24, 25), page_size=24, page_attention=True),
    "pages_of_64": Case((1, 63, 100, 64, 65, 128), page_size=64, page_attention=True),
    "fp8": Case(key_type=FP8, value_type=FP8, page_attention=True),
    "fp8_for_bf16": Case(dtype=BF16, key_type=FP8, value_type=FP8, page_attention=True),
    "fp8_for_fp16": Case(dtype=FP16, key_type=FP8, value_type=FP8, tokens=1),
    "fp8_keys_only": Case(key_type=FP8),
    "fp8_values_only": Case(dtype=BF16, value_type=FP8),
    "list_per_head": Case(page_list_per_head=True, kv_heads=3, page_attention=True),
    "list_per_head_ragged": Case(
        page_list_per_head=True, tokens=(1, 4, 2, 1, 0), table_type=torch.int32
    ),
    "rotary": Case(key_rotary=True, page_attention=True),
    "rotary_10": Case(key_rotary=True, head_dim=10, page_size=7),
    "rotary_80_list_per_head": Case(
        key_rotary=True, head_dim=80, page_list_per_head=True, tokens=(1, 4, 2, 1, 0)
    ),
    "rotary_bf16": Case(key_rotary=True, head_dim=128, dtype=BF16, page_attention=True),
    "rotary_fp8": Case(
        key_rotary=True, dtype=FP16, key_type=FP8, value_type=FP8, page_attention=True
    ),
    "other_scale": Case(scale=0.25, page_attention=True),
    "int32_indices": Case(table_type=torch.int32, length_type=torch.int32),
    "int32_lengths": Case(length_type=torch.int32, tokens=(1, 2, 3, 0, 1)),
    "queries_of_qkv": Case(queries_of_qkv=True, tokens=(1, 2, 3, 0, 1)),
    "heads_first": Case(heads_first=True, kv_heads=3, tokens=2, lengths=(63, 100)),
    "heads_first_rotary": Case(heads_first=True, key_rotary=True, queries_of_qkv=True),
    "shared_pages": Case(shared_pages=True, page_attention=True),
    "lse": Case(EDGES, head_dim=32, lse=True, page_attention=True),
    "lse_of_empty_requests": Case((0, 5), tokens=(3, 2), lse=True),
    "queries_of_no_request": Case(
        (1, 63, 100, 0, 5), tokens=(9, 1, 4, 3, 0), causal=False, lse=True
    ),
    "queries_of_no_request_rotary_bf16": Case(
        key_rotary=True,
        dtype=BF16,
        tokens=9,
        causal=False,
        lse=True,
        page_attention=True,
    ),
    "queries_of_no_request_list_per_head": Case(
        page_list_per_head=True, tokens=9, causal=False, kv_heads=3, lse=True
    ),
}


def make(
    case: Case, device: torch.device, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a kernel, and those of its definition in float32 without NaN."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    kv_heads, head_dim, page_size = case.kv_heads, case.head_dim, case.page_size
    batch, num_tokens = len(case.lengths), sum(case.counts)
    held = -(-max(case.lengths) // page_size) + case.spare_pages
    lists = (batch, kv_heads, held) if case.page_list_per_head else (batch, held)
    num_pages = torch.Size(lists).numel() + 3
    order = torch.randperm(num_pages, generator=random)[:-3]
    if case.shared_pages:
        order = torch.randint(max(held, 2), order.shape, generator=random)
    # One more column than requests can hold, as of a table that is larger.
    table = torch.full((*lists[:-1], held + 1), GARBAGE[0])[..., :-1]
    table.copy_(order.view(lists))

    seen = torch.zeros(num_pages, page_size, kv_heads, dtype=torch.bool)
    for request, length in enumerate(case.lengths):
        index = torch.arange(length)
        for head in range(kv_heads):
            pages = table[request, head] if case.page_list_per_head else table[request]
            seen[pages[index // page_size], index % page_size, head] = True
        unread = table[request, ..., -(-length // page_size) :]
        unread[:] = torch.tensor(GARBAGE).repeat(held)[: unread.shape[-1]]

    def pool(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        numbers = normal(num_pages, page_size, kv_heads, head_dim).to(dtype).float()
        clean = numbers.masked_fill(~seen[..., None], 0.0)
        shape = (num_pages + 2 * MARGIN, page_size, kv_heads, head_dim)
        if case.heads_first:
            shape = (shape[0], kv_heads, page_size, head_dim)
        around = torch.full(shape, torch.nan)
        if case.heads_first:
            around = around.transpose(1, 2)
        around[MARGIN:-MARGIN] = numbers.masked_fill(~seen[..., None], torch.nan)
        around = around.to(device, dtype)  # keeps strides
        return around[MARGIN:-MARGIN], clean.to(device, dtype)

    key_type, value_type = case.key_type or case.dtype, case.value_type or case.dtype
    (key_pages, clean_keys), (value_pages, clean_values) = (
        pool(key_type),
        pool(value_type),
    )
    heads = case.group * kv_heads
    extra = 2 * kv_heads if case.queries_of_qkv else 0
    queries = normal(num_tokens, heads + extra, head_dim).to(device, case.dtype)
    if case.queries_of_qkv:
        queries[:, heads:] = torch.nan
    queries = queries[:, :heads]

    ends = torch.tensor(case.counts).cumsum(0)
    shared: dict[str, Any] = {
        "page_table": table.to(device, case.table_type),
        "lengths": torch.tensor(case.lengths).to(device, case.length_type),
        "query_starts": torch.cat([ends[:1] * 0, ends]).to(device, case.table_type),
        "max_query_tokens": case.max_tokens or max(case.counts),
        "scale": case.scale,
        "causal": case.causal,
    }
    if key_type == FP8:
        shared["key_scale"] = (0.5 + torch.rand(kv_heads, generator=random)).to(device)
    if value_type == FP8:
        shared["value_scale"] = (0.5 + torch.rand(kv_heads, generator=random)).to(
            device
        )
    if case.key_rotary:
        half = 6 * normal(held * page_size, head_dim // 2)
        cos = torch.cat([half.cos(), half.cos()], -1)
        sin = torch.cat([-half.sin(), half.sin()], -1)
        shared["key_rotary"] = (cos.to(device), sin.to(device))

    def shares() -> Tensor | None:
        if not case.page_attention:
            return None
        return torch.full((num_tokens, heads, held), UNWRITTEN, device=device)

    def lse() -> Tensor | None:
        if not case.lse:
            return None
        return torch.full((num_tokens, heads), UNWRITTEN, device=device)

    poisoned = {
        **shared,
        "queries": queries,
        "key_pages": key_pages,
        "value_pages": value_pages,
        "page_attention": shares(),
        "lse": lse(),
    }
    clean = {
        **shared,
        "queries": queries.float(),
        "key_pages": clean_keys if key_type == FP8 else clean_keys.float(),
        "value_pages": clean_values if value_type == FP8 else clean_values.float(),
        "page_attention": shares(),
        "lse": lse(),
    }
    return poisoned, clean
