"""What drafting did, for people: Prometheus metrics, and a line beside vLLM's."""

import time
from collections import Counter as Counts
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_budgetdraft.vllm_integration.faults import logger
from vllm_budgetdraft.vllm_integration.metrics.statistics import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    KEY,
    LABELLED_COUNTERS,
    PREFIX,
)

LABELS = ["model_name", "engine"]  # vLLM's
METRICS: dict[str, Any] = {
    **{
        name: Gauge(PREFIX + name, text, LABELS, multiprocess_mode="mostrecent")
        for name, text in GAUGES.items()
    },
    **{name: Counter(PREFIX + name, text, LABELS) for name, text in COUNTERS.items()},
    **{
        name: Counter(PREFIX + name, text, [*LABELS, label])
        for name, (label, text) in LABELLED_COUNTERS.items()
    },
    **{
        name: Histogram(PREFIX + name, text, LABELS, buckets=bounds)
        for name, (bounds, text) in HISTOGRAMS.items()
    },
}


class BudgetDraftStatLogger(AggregateStatLoggerBase):
    """The part of vLLM's statistics that is ours, of all engines of a server.

    vLLM's loggers must come after it: they take what carries it for a KV connector's.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._model_name = vllm_config.model_config.served_model_name
        for engine in engine_indexes:
            for name in COUNTERS:  # which are there before they first count
                METRICS[name].labels(self._model_name, str(engine))
        self._gauges: dict[int, dict[str, float]] = {}
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._start = time.monotonic()
        self._counts: dict[str, Counts[str]] = {
            name: Counts() for name in (*COUNTERS, *LABELLED_COUNTERS)
        }

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Takes ours out of ``scheduler_stats``, and counts it."""
        carried = scheduler_stats and scheduler_stats.kv_connector_stats
        if not carried or KEY not in carried:
            return
        ours = carried.pop(KEY)
        scheduler_stats.kv_connector_stats = carried or None
        labels = self._model_name, str(engine_idx)
        self._gauges.setdefault(engine_idx, {}).update(ours["gauges"])
        for name, value in ours["gauges"].items():
            METRICS[name].labels(*labels).set(value)
        for name, label, amount in ours["counts"]:
            if name in HISTOGRAMS:
                for _ in range(int(amount)):
                    METRICS[name].labels(*labels).observe(float(label))
                continue
            METRICS[name].labels(*labels, *([label] if label else [])).inc(amount)
            self._counts[name][label] += amount

    def log(self) -> None:
        """A line like vLLM's "SpecDecoding metrics", if there was anything to count."""
        total = {name: counts.total() for name, counts in self._counts.items()}
        if any(total.values()):
            gauges = {
                name: sum(each.get(name, 0) for each in self._gauges.values())
                for name in GAUGES
            }
            num_engines = len(self._gauges)
            num_pages = gauges["pages_in_use"] + gauges["pages_free"]
            elapsed = (time.monotonic() - self._start) * num_engines
            logger.info(
                "BudgetDraft metrics: Draft length: %.1f, Draft time: %.2f ms/step "
                "(%.1f%%), Draft cache usage: %.1f%%, Evicted: %d tokens, Without "
                "drafts: %s, Failures: %s",
                gauges["draft_length"] / num_engines,
                1000 * total["draft_seconds"] / max(1, total["draft_steps"]),
                100 * total["draft_seconds"] / elapsed,
                100 * gauges["pages_in_use"] / max(1, num_pages),
                total["evicted_tokens"],
                _listed(self._counts["drafts_skipped"]),
                _listed(self._counts["draft_faults"]),
            )
        self._begin_interval()

    def log_engine_initialized(self) -> None:
        """The worker has said what it allocated."""


def _listed(counts: Counts[str]) -> str:
    """The sum, and in brackets its parts, largest first."""
    parts = ", ".join(f"{label} {count:.0f}" for label, count in counts.most_common())
    return f"{counts.total():.0f} ({parts})" if parts else "0"
