"""What drafting did, from where it happens to Prometheus and the log."""

import pickle
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from prometheus_client import REGISTRY

from tests.support.drafting import build_proposer
from vllm_budgetdraft.proposer.warm_up import warm_up
from vllm_budgetdraft.vllm_integration.metrics.observation import (
    CoreObserver,
    DraftTimer,
)
from vllm_budgetdraft.vllm_integration.metrics.statistics import KEY, DraftStatistics
from vllm_budgetdraft.vllm_integration.patching import specialise


def test_what_is_taken_is_taken_once():
    statistics = DraftStatistics()
    statistics.set("draft_length", 8)
    statistics.count("evicted_tokens", 16)
    statistics.count("drafts_skipped", label="reading")
    statistics.count("drafts_skipped", label="reading")
    statistics.count("draft_seconds", 0.0)  # what is nothing does not travel
    taken = statistics.take()
    assert taken == {
        "gauges": {"draft_length": 8},
        "counts": [["evicted_tokens", "", 16], ["drafts_skipped", "reading", 2]],
    }
    assert statistics.take() == {"gauges": {}, "counts": []}


def test_it_survives_every_way_between_processes():
    statistics = DraftStatistics()
    statistics.set("pages_free", 3)
    statistics.count("draft_faults", label="ValueError")
    taken = statistics.take()
    by_pickle = pickle.loads(pickle.dumps(taken))
    by_msgpack = msgspec.msgpack.decode(msgspec.msgpack.encode(taken))
    for each in (by_pickle, by_msgpack):
        statistics.add(each)
    assert statistics.take() == {
        "gauges": {"pages_free": 3},
        "counts": [["draft_faults", "ValueError", 2]],
    }


@pytest.mark.parametrize(
    ("name", "label"), [("evicted", ""), ("drafts_skipped", ""), ("draft_steps", "why")]
)
def test_a_name_that_nobody_shows_is_a_mistake(name, label):
    with pytest.raises(AssertionError):
        DraftStatistics().count(name, label=label)


class Output:
    """Of a step, which vLLM hands on from process to process."""


def worker_with(proposer: object, output: Output) -> Any:
    """A worker of ours over one of vLLM's whose steps end with ``output``."""
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_budgetdraft.vllm_integration.worker import DraftWorker

    class Theirs(Worker):
        model_runner = SimpleNamespace(drafter=proposer)

        def __init__(self) -> None: ...

        def sample_tokens(self) -> Output:
            return output

        def execute_model(self, scheduler_output: Any) -> Output:
            return output

    worker = Theirs()
    specialise(worker, DraftWorker)
    return worker


def told_by(output: Output) -> dict[str, Any]:
    """What a scheduler of ours has to tell the front end after a step."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_budgetdraft.vllm_integration.scheduler import DraftScheduler

    class Theirs(Scheduler):
        def __init__(self) -> None:
            settings = SimpleNamespace(adaptive_draft_length=False)
            self.vllm_config = SimpleNamespace(
                speculative_config=SimpleNamespace(settings=settings)
            )

        def update_from_output(self, scheduled: Any, output: Any) -> str:
            return "went on"

        def make_stats(self) -> Any:
            return SimpleNamespace(kv_connector_stats={"theirs": 1})

    scheduler: Any = Theirs()
    specialise(scheduler, DraftScheduler)
    scheduler.begin_drafting()
    assert scheduler.update_from_output(None, output) == "went on"
    stats = scheduler.make_stats().kv_connector_stats
    assert stats["theirs"] == 1
    return stats[KEY]


@pytest.mark.vllm
def test_what_fails_in_counting_ends_no_step():
    class Proposer:
        def take_statistics(self):
            raise ZeroDivisionError

    output = worker_with(Proposer(), Output()).sample_tokens()
    assert told_by(output)["counts"] == [["draft_faults", "ZeroDivisionError", 1]]


@pytest.mark.vllm
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_step_without_tokens_releases_who_is_over_and_is_counted(num_tokens):
    class Proposer:
        num_pages = 4

        def release_ended(self):
            self.num_pages = 0

        def take_statistics(self):
            return {"gauges": {"pages_in_use": self.num_pages}, "counts": []}

    empty = Output()  # one object for every such step
    worker = worker_with(Proposer(), empty)
    scheduled = SimpleNamespace(total_num_scheduled_tokens=num_tokens)
    output = worker.execute_model(scheduled)
    assert not vars(empty)
    gauges = told_by(output)["gauges"]
    assert gauges == ({} if num_tokens else {"pages_in_use": 0})


def test_an_observer_counts_evictions_once(drafter_folder):
    settings = {"eviction_policy": "sink_window", "kv_budget": 40, "recent_window": 40}
    core = build_proposer(drafter_folder, num_slots=2, **settings)
    statistics = DraftStatistics()
    observer = CoreObserver(core, statistics)

    def observed() -> tuple[dict[str, float], float]:
        observer.observe()
        taken = statistics.take()
        return taken["gauges"], sum(amount for *_, amount in taken["counts"])

    num_pages = core.cache.pool.num_pages
    warm_up(core)
    gauges, evicted = observed()
    assert evicted == 0
    assert gauges["pages_free"] == num_pages and gauges["pages_in_use"] == 0
    core.start_request(0)
    core.ingest(0, torch.zeros(100, dtype=torch.int64))
    gauges, evicted = observed()
    assert evicted == 60
    assert gauges["pages_in_use"] == core.cache.pages_per_slot
    assert observed()[1] == 0
    core.release_request(0)
    core.start_request(0)  # whose evictions are not those of the one before
    core.ingest(0, torch.zeros(70, dtype=torch.int64))
    assert observed()[1] == 30


def test_seconds_of_a_gpu_count_when_it_has_passed_both_events(monkeypatch):
    class Event:
        passed = False

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            events.append(self)

        def record(self) -> None:
            self.time = len(events) * 10.0  # ms: 10 between two

        def query(self) -> bool:
            return self.passed

        def elapsed_time(self, end: "Event") -> float:
            return end.time - self.time + 10

    events: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = DraftTimer(torch.device("cuda"))
    for _ in range(2):
        with timer.measure():
            pass
    assert timer.take() == 0
    events[1].passed = True
    assert timer.take() == pytest.approx(0.01)
    assert timer.take() == 0
    events[3].passed = True
    assert timer.take() == pytest.approx(0.01)


def test_seconds_of_a_cpu_are_its_clocks(monkeypatch):
    import time

    timer = DraftTimer(torch.device("cpu"))
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with timer.measure():
        pass
    assert timer.take() == 2.5 and timer.take() == 0


@pytest.fixture
def stat_logger(monkeypatch):
    from vllm_budgetdraft.vllm_integration.metrics import prometheus as metrics

    lines: list[str] = []
    monkeypatch.setattr(
        metrics.logger, "info", lambda text, *args: lines.append(text % args)
    )
    model = SimpleNamespace(served_model_name="unit")
    logger = metrics.BudgetDraftStatLogger(SimpleNamespace(model_config=model), [0, 1])
    return logger, lines


def sample(name: str, **labels: str) -> float | None:
    labels = {"model_name": "unit", "engine": "0", **labels}
    return REGISTRY.get_sample_value(f"vllm_budgetdraft:{name}", labels)


def test_a_scheduler_step_becomes_metrics_and_a_line(stat_logger):
    logger, lines = stat_logger
    assert sample("evicted_tokens_total", engine="1") == 0  # before anything happened
    logger.log()
    logger.record(None, None)
    logger.record(SimpleNamespace(kv_connector_stats=None), None)
    assert lines == []
    step = {
        "gauges": {"draft_length": 8, "pages_in_use": 30, "pages_free": 90},
        "counts": [
            ["draft_steps", "", 2],
            ["draft_seconds", "", 0.006],
            ["evicted_tokens", "", 32],
            ["drafts_skipped", "reading", 3],
            ["drafts_skipped", "off", 1],
            ["draft_faults", "ValueError", 1],
            ["tokens_to_read", "prefill", 500],
            ["steps_to_first_draft", "0", 3],
            ["steps_to_first_draft", "5", 1],
        ],
    }
    stats = SimpleNamespace(kv_connector_stats={KEY: step, "theirs": 1})
    before = sample("draft_steps_total")
    logger.record(stats, None)
    assert stats.kv_connector_stats == {"theirs": 1}
    stats = SimpleNamespace(kv_connector_stats={KEY: step})
    logger.record(stats, None)
    assert stats.kv_connector_stats is None  # as vLLM has it without a connector
    assert sample("draft_steps_total") - before == 4
    assert sample("pages_free") == 90
    assert sample("drafts_skipped_total", reason="reading") >= 6
    assert sample("tokens_to_read_total", cause="prefill") >= 1000
    assert sample("steps_to_first_draft_bucket", le="4.0") == 6
    assert sample("steps_to_first_draft_count") == 8
    assert sample("steps_to_first_draft_sum") == 10
    assert sample("draft_faults_total", error="ValueError") >= 2
    logger.log()
    (line,) = lines
    assert line.startswith(
        "BudgetDraft metrics: Draft length: 8.0, Draft time: 3.00 ms/step ("
    )
    assert line.endswith(
        "Draft cache usage: 25.0%, Evicted: 64 tokens, Without drafts: 8 (reading 6, "
        "off 2), Failures: 2 (ValueError 2)"
    )
    logger.log()
    assert len(lines) == 1  # nothing happened since
    # A server that drafts for nobody says why.
    step = {"gauges": {"draft_length": 0}, "counts": [["drafts_skipped", "off", 3]]}
    logger.record(SimpleNamespace(kv_connector_stats={KEY: step}), None)
    logger.log()
    assert "Draft length: 0.0" in lines[1] and "3 (off 3)" in lines[1]
