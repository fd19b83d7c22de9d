"""One layer's draft step at a position far into its context.

The cache is bounded: at any context a request holds as many tokens as its budget.
Attention reads as many pages, and the step computes as many indices. What differs with
the context is *which*: page numbers, here drawn from a pool with room for the whole
context of every request (memory allowing), and the position, whose row is read from a
table of angles as long as the context. A budgeted drafter's own pool does not grow, so
its pages lie closer together than these.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.micro import workloads
from benchmarks.micro.workloads import PAGE_SIZE, Inputs, ModelShape, Workload

#: Share of the free memory that a pool may take.
POOL_SHARE = 0.3
CPU_POOL_BYTES = 64 << 20


@dataclass(frozen=True)
class ContextWorkload:
    """Inputs of steps and of the attention in them.

    Attributes:
        steps: its sets are arguments of ``step``, but for the kernels.
        attention: of the same pages.
        pool_tokens: that the pool has room for.
    """

    steps: Workload
    attention: Workload
    pool_tokens: int


def build(
    shape: ModelShape, batch: int, budget: int, context: int, device: torch.device
) -> ContextWorkload:
    """One query token each, the last of a context of ``context`` tokens."""
    assert context >= budget, (context, budget)
    room = int(_pool_bytes(device) / shape.token_bytes(workloads.draft_dtype(device)))
    attention = workloads.attention(
        shape, batch, budget, device, pool_tokens=min(batch * context, room)
    )
    cos, sin = workloads.angles(torch.arange(context, device=device), shape.head_dim)
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    positions = torch.full((batch,), context - 1, device=device)
    steps = [
        {
            "qkv": workloads.normal(batch, num_heads, shape.head_dim, device=device),
            "cos": cos,
            "sin": sin,
            "positions": positions,
            "num_evicted": positions - (budget - 1),
            "attention": inputs,
        }
        for inputs in attention.sets
    ]
    num_pages = attention.sets[0]["key_pages"].shape[0]
    return ContextWorkload(
        Workload(steps, attention.moved_bytes), attention, num_pages * PAGE_SIZE
    )


def step(
    kernels: ModuleType,
    *,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_evicted: Tensor,
    attention: Inputs,
) -> Tensor:
    """Where the new tokens go, their write, and the attention: [B, H, D]."""
    indices = positions - num_evicted
    pages = attention["page_table"].gather(1, indices[:, None] // PAGE_SIZE)[:, 0]
    queries = kernels.paged_cache_write(
        qkv,
        cos[positions],
        sin[positions],
        attention["key_pages"],
        attention["value_pages"],
        pages * PAGE_SIZE + indices % PAGE_SIZE,
        validate=False,
    )
    inputs = attention | {"queries": queries, "lengths": indices + 1}
    return kernels.paged_sparse_attention(**inputs, validate=False)


def _pool_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return CPU_POOL_BYTES
    torch.cuda.empty_cache()  # What earlier rows took is free too.
    free, _ = torch.cuda.mem_get_info(device)
    return free * POOL_SHARE
