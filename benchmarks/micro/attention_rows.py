"""The rows of the attention report: what is measured in each."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.micro import contenders, contexts, gate, timing, workloads
from benchmarks.micro.contenders import Calls
from benchmarks.micro.report_file import Row
from benchmarks.micro.targets import time_us
from benchmarks.micro.workloads import SHAPES, Inputs, Workload, in_a_row, in_turn
from budgetdraft_kernels import launch_settings, reference

REPEAT_MS = {"cuda": 50, "cpu": 5}


@dataclass(frozen=True)
class Cell:
    """What one row measures; ``context`` is None where it plays no part."""

    shape: str
    batch: int
    budget: int
    context: int | None = None

    @property
    def kind(self) -> str:
        return "bandwidth" if self.context is None else "context"


def kernels_for(device: torch.device) -> ModuleType:
    form = "fused" if device.type == "cuda" else "reference"
    return import_module(f"budgetdraft_kernels.{form}")


def row_of(cell: Cell, device: torch.device, copy_bandwidth: float) -> Row:
    """A cell's row, or what kept it from being measured."""
    if cell.context is None:
        measure = partial(bandwidth_row, cell, device, copy_bandwidth)
    else:
        measure = partial(context_row, cell, device)
    return {"kind": cell.kind} | asdict(cell) | attempt(measure)


def bandwidth_row(cell: Cell, device: torch.device, copy_bandwidth: float) -> Row:
    """Ours against the copy bandwidth, SDPA and vLLM over the same pages."""
    workload = workloads.attention(SHAPES[cell.shape], cell.batch, cell.budget, device)
    calls = contenders.ours(workload, kernels_for(device).paged_sparse_attention)
    expected = expected_outputs(workload)
    with splits_recorded() as splits:
        calls[0]()
    times = {"ours": _timed(calls, expected, device)}
    others = {"sdpa": contenders.sdpa, "gather_and_sdpa": contenders.gather_and_sdpa}
    if device.type == "cuda":
        others["vllm"] = contenders.vllm
    for name, prepare in others.items():
        times[name] = attempt(partial(_other, prepare, workload, expected, device))
    # How far two measurements of the same thing lie apart.
    times["ours_again"] = _timed(calls, expected, device)
    ours_us = time_us(times["ours"])
    bytes_per_s = workload.moved_bytes / (ours_us * 1e-6)
    return {
        "moved_bytes": workload.moved_bytes,
        "input_sets": len(workload.sets),
        "splits": splits[-1] if splits else None,
        "times": times,
        "bytes_per_s": bytes_per_s,
        "copy_bandwidth_share": bytes_per_s / copy_bandwidth,
        "speedup_over": {
            name: time_us(times[name]) / ours_us
            for name in others
            if "error" not in times[name]
        },
    }


def context_row(cell: Cell, device: torch.device) -> Row:
    """Attention, and the whole step of one layer, late in a context."""
    assert cell.context is not None
    shape, kernels = SHAPES[cell.shape], kernels_for(device)
    built = contexts.build(shape, cell.batch, cell.budget, cell.context, device)
    attend = built.attention.calls(kernels.paged_sparse_attention, validate=False)
    attention = _timed(attend, expected_outputs(built.attention), device)
    # Steps write to the pages, the same each time.
    plain = _ends(built.steps.calls(partial(contexts.step, reference)))
    steps = built.steps.calls(partial(contexts.step, kernels))
    step = _timed(steps, [call() for call in plain], device)
    return {
        "pool_tokens": built.pool_tokens,
        "input_sets": len(built.attention.sets),
        "times": {"attention": attention, "step": step},
    }


def expected_outputs(workload: Workload) -> list[Tensor]:
    """Of the first and the last input set, in higher precision."""
    return [
        reference.paged_sparse_attention(**_higher(inputs), validate=False)
        for inputs in _ends(workload.sets)
    ]


def check(calls: Calls, expected: Sequence[Tensor]) -> float:
    """The largest relative error of the first and the last call.

    Raises:
        RedGateError: it is too large.
    """
    outputs = [call() for call in _ends(calls)]
    return max(
        gate.require_close(found, wanted, found.dtype)
        for found, wanted in zip(outputs, expected, strict=True)
    )


def graph_times(calls: Calls, device: torch.device, repeat_ms: int) -> timing.Quantiles:
    """Of one of ``calls``, all of them in one CUDA graph."""
    return timing.measure(
        in_a_row(calls),
        device,
        in_graph=True,
        num_calls=len(calls),
        repeat_ms=repeat_ms,
    )


@contextmanager
def splits_recorded() -> Iterator[list[int]]:
    """In how many parts each launch reads a KV head."""
    original = launch_settings.attention_splits
    recorded: list[int] = []

    def attention_splits(*args: Any, **kwargs: Any) -> int:
        splits = original(*args, **kwargs)
        tiles = inspect.signature(original).bind(*args, **kwargs).arguments["tiles"]
        # Each part has as many whole tiles, so that fewer parts may do.
        recorded.append(-(-tiles // -(-tiles // splits)))
        return splits

    with patch.object(launch_settings, "attention_splits", attention_splits):
        yield recorded


def attempt(measure: Callable[[], Row]) -> Row:
    """What ``measure`` returns; or the error, which must not cost the other rows."""
    try:
        return measure()
    except Exception as error:
        return {"error": timing.first_line(error)}


def _other(
    prepare: Callable[[Workload], Calls],
    workload: Workload,
    expected: Sequence[Tensor],
    device: torch.device,
) -> Row:
    return _timed(prepare(workload), expected, device)


def _timed(calls: Calls, expected: Sequence[Tensor], device: torch.device) -> Row:
    """Times of calls that return the right thing.

    Raises:
        RedGateError: they do not.
    """
    error, call = check(calls, expected), in_turn(calls)
    measured: Row = {"relative_error": error}
    repeat_ms = REPEAT_MS[device.type]
    if device.type == "cuda":
        measured["in_graph"] = asdict(graph_times(calls, device, 2 * repeat_ms))
    measured["eager"] = asdict(timing.measure(call, device, repeat_ms=repeat_ms))
    measured["peak_memory_bytes"] = timing.peak_memory_bytes(call, device)
    return measured


def _ends(items: Sequence[Any]) -> list[Any]:
    return [items[0], items[-1]]


def _higher(inputs: Inputs) -> Inputs:
    """In a type of more precision, with the pages in use alone."""
    table = inputs["page_table"]
    dtype = gate.HIGHER[inputs["queries"].dtype]
    pages = {
        name: inputs[name][table.flatten()].to(dtype)
        for name in ("key_pages", "value_pages")
    }
    held = torch.arange(table.numel(), device=table.device).view(table.shape)
    queries = inputs["queries"].to(dtype)
    return inputs | pages | {"queries": queries, "page_table": held}
