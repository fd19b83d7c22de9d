"""Time of a call, and the copy bandwidth that bounds it."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

#: A copy moves so many times what the last cache holds.
COPY_CACHES = 32
CPU_COPY_BYTES = 64 << 20
MIN_CPU_CALLS = 5


@dataclass(frozen=True)
class Quantiles:
    """Of the time of one call.

    Attributes:
        timer: "do_bench", one call at a time, each with a cold cache and with its
            launches; "do_bench_cudagraph", means over graphs of many calls; or
            "perf_counter".
        note: why it is not the timer that was asked for.
    """

    p20_us: float
    p50_us: float
    p80_us: float
    timer: str
    note: str | None = None


def measure(
    function: Callable[[], Any],
    device: torch.device,
    *,
    in_graph: bool = False,
    num_calls: int = 1,
    repeat_ms: int = 100,
) -> Quantiles:
    """Runs ``function`` for about ``repeat_ms``.

    Args:
        in_graph: whether it is replayed from a CUDA graph, as draft steps are. What
            cannot be captured is timed without, which ``note`` then says.
        num_calls: that ``function`` makes; times are of one.
    """
    if device.type != "cuda":
        times_us = _cpu_times_us(function, repeat_ms)
        return _quantiles_of([each / num_calls for each in times_us])
    from triton import testing

    wanted = [0.2, 0.5, 0.8]
    note = None
    if in_graph:
        # The graph is as long as `rep`, and is replayed ten times.
        graph_ms = max(1, repeat_ms // 10)
        try:
            times = testing.do_bench_cudagraph(function, graph_ms, quantiles=wanted)
            return _from_ms(times, num_calls, "do_bench_cudagraph")
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            note = f"not in a CUDA graph: {first_line(error)}"
    times = testing.do_bench(
        function, warmup=repeat_ms // 4, rep=repeat_ms, quantiles=wanted
    )
    return _from_ms(times, num_calls, "do_bench", note)


def copy_bandwidth(device: torch.device, buffer_bytes: int | None = None) -> float:
    """Bytes per second of a large copy, those read and those written both counted."""
    if buffer_bytes is None:
        buffer_bytes = COPY_CACHES * cache_bytes(device) or CPU_COPY_BYTES
    source = torch.randint(256, (buffer_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time_us = measure(lambda: target.copy_(source), device).p50_us
    return 2 * buffer_bytes / (time_us * 1e-6)


def cache_bytes(device: torch.device) -> int:
    """Of the last cache; 0 on a CPU, where inputs are not rotated."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def peak_memory_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that one call holds beside its arguments; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, one: threads that share cores with others wait for one another."""
    num_threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def first_line(error: BaseException) -> str:
    """An error's type and the start of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _from_ms(
    times: Sequence[float], num_calls: int, timer: str, note: str | None = None
) -> Quantiles:
    p20_us, p50_us, p80_us = (1000 * each / num_calls for each in times)
    return Quantiles(p20_us, p50_us, p80_us, timer, note)


def _quantiles_of(times_us: list[float]) -> Quantiles:
    tenths = statistics.quantiles(times_us, n=10, method="inclusive")
    return Quantiles(tenths[1], tenths[4], tenths[7], timer="perf_counter")


def _cpu_times_us(function: Callable[[], Any], repeat_ms: int) -> list[float]:
    function()  # Warms up.
    times: list[float] = []
    end = time.perf_counter() + repeat_ms / 1000
    while (start := time.perf_counter()) < end or len(times) < MIN_CPU_CALLS:
        function()
        times.append((time.perf_counter() - start) * 1e6)
    return times
