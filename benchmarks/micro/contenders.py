"""What attends over a workload's pages: ours, PyTorch's SDPA, and vLLM's kernel.

Each function prepares one call for every input set; a call returns [T, H, D]. The
workload has one query token for each request, and all tokens of the table are seen, so
that SDPA needs no mask: that is the best case for it.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro.workloads import Inputs, Workload

Calls = list[Callable[[], Tensor]]

VLLM_KERNEL = "vllm.v1.attention.ops.triton_unified_attention"
VLLM_BACKEND = "vllm.v1.attention.backends.triton_attn"
#: What vLLM's backend has, if it cannot be imported.
MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS = 128, 16


def ours(workload: Workload, kernel: Callable[..., Tensor]) -> Calls:
    return workload.calls(kernel, validate=False)


def sdpa(workload: Workload) -> Calls:
    """SDPA over keys and values that were gathered beforehand."""

    def prepared(inputs: Inputs) -> Callable[[], Tensor]:
        queries, keys, values = inputs["queries"], *_gathered(inputs)
        return lambda: _attended(queries, keys, values)

    return [prepared(inputs) for inputs in workload.sets]


def gather_and_sdpa(workload: Workload) -> Calls:
    """SDPA over keys and values that every call gathers."""

    def prepared(inputs: Inputs) -> Callable[[], Tensor]:
        return lambda: _attended(inputs["queries"], *_gathered(inputs))

    return [prepared(inputs) for inputs in workload.sets]


def vllm(workload: Workload) -> Calls:
    """vLLM's Triton attention, launched as its backend launches a decode step.

    Raises:
        ImportError: there is no vLLM, or its kernel is elsewhere.
        TypeError: the kernel needs an argument that is not known here.
    """
    unified_attention = importlib.import_module(VLLM_KERNEL).unified_attention
    parameters = inspect.signature(unified_attention).parameters
    scratch = _segments(workload.sets[0])

    def prepared(inputs: Inputs) -> Callable[[], Tensor]:
        known = _vllm_arguments(inputs) | scratch
        arguments = {name: known[name] for name in known if name in parameters}
        required = {
            name for name, each in parameters.items() if each.default is each.empty
        }
        if unknown := required - set(arguments):
            raise TypeError(f"unified_attention needs {sorted(unknown)} too")

        def call() -> Tensor:
            unified_attention(**arguments)
            return arguments["out"]

        return call

    return [prepared(inputs) for inputs in workload.sets]


def _gathered(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values of each request, [B, G, N * P, D]; token after token."""
    batch, held = inputs["page_table"].shape
    _, page_size, num_kv_heads, head_dim = inputs["key_pages"].shape
    pages, sizes = inputs["page_table"].flatten(), (batch, held * page_size)
    keys, values = (
        inputs[name].index_select(0, pages).view(*sizes, num_kv_heads, head_dim)
        for name in ("key_pages", "value_pages")
    )
    return keys.transpose(1, 2), values.transpose(1, 2)


def _attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Query heads that share a KV head are rows of one product: [B, H, D]."""
    rows = queries.unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(rows, keys, values).flatten(1, 2)


def _vllm_arguments(inputs: Inputs) -> dict[str, Any]:
    queries, key_pages = inputs["queries"], inputs["key_pages"]
    batch, held = inputs["page_table"].shape
    page_size, num_kv_heads, head_dim = key_pages.shape[1:]
    ones = torch.ones((), device=queries.device).expand(batch, num_kv_heads)
    return {
        "q": queries,
        "k": key_pages,
        "v": inputs["value_pages"],
        # What is not written shows.
        "out": torch.full_like(queries, torch.nan),
        "cu_seqlens_q": inputs["query_starts"].int(),
        "max_seqlen_q": 1,
        "seqused_k": inputs["lengths"].int(),
        "max_seqlen_k": held * page_size,
        "softmax_scale": head_dim**-0.5,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": inputs["page_table"].int(),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": ones,
        "v_descale": ones,
    }


def _segments(inputs: Inputs) -> dict[str, Any]:
    """How vLLM's backend splits small batches, and memory for the parts."""
    try:
        backend = importlib.import_module(VLLM_BACKEND)
        min_grid = backend.MIN_LAUNCH_GRID_SIZE_2D
        num_segments = backend.NUM_PAR_SOFTMAX_SEGMENTS
    except (ImportError, AttributeError):
        min_grid, num_segments = MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    threshold = min_grid // inputs["key_pages"].shape[2]
    _, num_heads, head_dim = inputs["queries"].shape
    sizes = (max(1, threshold), num_heads, num_segments)
    dim_block = 1 << (head_dim - 1).bit_length()
    new = {"dtype": torch.float32, "device": inputs["queries"].device}
    return {
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": num_segments,
        "softmax_segm_output": torch.empty(*sizes, dim_block, **new),
        "softmax_segm_max": torch.empty(sizes, **new),
        "softmax_segm_expsum": torch.empty(sizes, **new),
    }
