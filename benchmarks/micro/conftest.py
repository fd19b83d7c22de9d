"""Fixtures of the benchmarks."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.micro import gate, timing
from benchmarks.micro.workloads import (
    ON_GPU,
    Workload,
    draft_dtype,
    in_a_row,
    in_turn,
)
from vllm_budgetdraft import provenance

Bench = Callable[..., None]
#: Triton kernels are timed on a GPU alone.
FORMS = ["reference", "fused"] if ON_GPU else ["reference"]
ROUNDS, REPEAT_MS = (20, 100) if ON_GPU else (5, 20)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """``--benchmark-json`` says what the numbers were measured on, a GPU included."""
    arguments = {"pytest": [str(each) for each in config.invocation_params.args]}
    output_json["provenance"] = provenance.collect(arguments)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session", autouse=True)
def one_thread(device: torch.device) -> Iterator[None]:
    with timing.one_thread(device):
        yield


@pytest.fixture(scope="session")
def copy_bandwidth(device: torch.device) -> float:
    return timing.copy_bandwidth(device)


@pytest.fixture(params=FORMS)
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"budgetdraft_kernels.{request.param}")


@pytest.fixture
def bench(
    benchmark: BenchmarkFixture,
    device: torch.device,
    kernels: ModuleType,
    copy_bandwidth: float,
) -> Bench:
    """Checks an operation on a workload, times it, and notes how many bytes it moved.

    On a GPU the times that count are in ``extra_info``: pytest-benchmark's own are of
    the host.
    """

    def run(operation: str, workload: Workload, **options: Any) -> None:
        _check(operation, workload, device, **options)
        kernel = getattr(kernels, operation)
        calls = workload.calls(kernel, **options)
        call = in_turn(calls)
        times = {"eager": timing.measure(call, device, repeat_ms=REPEAT_MS)}
        if device.type == "cuda":
            times["in_graph"] = timing.measure(
                in_a_row(calls), device, in_graph=True, num_calls=len(calls)
            )
        best = times.get("in_graph", times["eager"])
        bytes_per_second = workload.moved_bytes / (best.p50_us * 1e-6)
        benchmark.extra_info.update(
            {name: asdict(quantiles) for name, quantiles in times.items()},
            device=str(device),
            cpu_threads=torch.get_num_threads(),
            moved_bytes=workload.moved_bytes,
            input_sets=len(workload.sets),
            peak_memory_bytes=timing.peak_memory_bytes(call, device),
            copy_bandwidth_fraction=bytes_per_second / copy_bandwidth,
        )
        benchmark.pedantic(_until_done(call, device), rounds=ROUNDS, warmup_rounds=1)

    return run


def _check(
    operation: str, workload: Workload, device: torch.device, **options: Any
) -> None:
    if not gate.fused_can_run(device):
        return
    fused, reference = (
        getattr(importlib.import_module(f"budgetdraft_kernels.{form}"), operation)
        for form in ("fused", "reference")
    )
    dtype = draft_dtype(device)
    gate.require_agreement(fused, reference, workload.sets[0], dtype, **options)


def _until_done(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
