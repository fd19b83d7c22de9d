"""Looks at drafting without waiting for its device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics


class CoreObserver:
    """Notes pages, evictions and graphs of a proposer; a GPU's evictions come late."""

    def __init__(self, core: DraftProposer, statistics: DraftStatistics) -> None:
        self._core = core
        self._statistics = statistics
        self._evicted = torch.zeros(
            1, dtype=torch.int64, pin_memory=is_gpu(core.device)
        )
        self._evicted_now = self._evicted.numpy()  # the same memory
        self._num_evicted = 0

    def observe(self) -> None:
        cache = self._core.cache
        pool, num_free = cache.pool, self._core.num_free_pages
        self._statistics.set("pages_in_use", pool.num_pages - num_free)
        self._statistics.set("pages_free", num_free)
        if (store := self._core.snapshots) is not None:
            kept = store.num_pages * pool.bytes_per_page
            self._statistics.set("snapshot_bytes", kept)
            self._statistics.count("snapshot_evictions", store.num_evicted)
            store.num_evicted = 0
        self._statistics.set("cuda_graphs", self._core.num_graphs)
        self._evicted.copy_(cache.total_evicted, non_blocking=True)
        num_evicted = int(self._evicted_now[0])
        self._statistics.count("evicted_tokens", num_evicted - self._num_evicted)
        self._num_evicted = num_evicted


class DraftTimer:
    """Seconds of the device between a beginning and an end, once it has passed both."""

    def __init__(self, device: torch.device) -> None:
        self._by_events = is_gpu(device)
        self._pending: deque[tuple[Any, ...]] = deque()
        self._seconds = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        if not self._by_events:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        events[0].record()
        yield
        events[1].record()
        self._pending.append(events)

    def take(self) -> float:
        """Seconds that became known since the last call."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._seconds += start.elapsed_time(end) / 1000  # milliseconds
        seconds, self._seconds = self._seconds, 0.0
        return seconds
