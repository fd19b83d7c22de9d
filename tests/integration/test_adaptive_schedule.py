"""Adaptive length in the scheduler's place, with a clock and no engine."""

from types import SimpleNamespace

import pytest

from tests.support.simulated_engine import KnownCosts
from vllm_budgetdraft.config import BudgetDraftConfig

pytestmark = pytest.mark.vllm


class Scheduler:
    """Requests that decode together, of a clock that the test sets."""

    def __init__(self, monkeypatch) -> None:
        from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics
        from vllm_budgetdraft.vllm_integration.v2 import adaptive_schedule

        self.now, self.running = 0.0, []
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(adaptive_schedule, "time", clock)
        config = BudgetDraftConfig(
            model="drafter", num_speculative_tokens=4, adaptive_draft_length=True
        )
        self.lengths = adaptive_schedule.AdaptiveSchedule(
            self, config, DraftStatistics()
        )

    def know_costs(self) -> None:
        self.lengths.use_costs(KnownCosts(lambda size, length: 1.0, 4))

    def serve(self, name: str) -> None:
        request = {"request_id": name, "num_computed_tokens": 9, "num_prompt_tokens": 9}
        self.running = [SimpleNamespace(**request)]

    def step(self, seconds: float = 1.0) -> int:
        length = self.lengths[len(self.running)]
        self.now += seconds
        return length


@pytest.fixture
def scheduler(monkeypatch) -> Scheduler:
    scheduler = Scheduler(monkeypatch)
    scheduler.know_costs()
    return scheduler


def test_until_costs_are_known_lengths_are_what_they_are_at_most(monkeypatch):
    scheduler = Scheduler(monkeypatch)
    scheduler.serve("a")
    assert {scheduler.step() for _ in range(400)} == {4}
    scheduler.know_costs()
    assert 0 in {scheduler.step() for _ in range(400)}


def test_each_choice_is_kept_for_four_steps(scheduler):
    scheduler.serve("a")
    lengths = [scheduler.step() for _ in range(400)]
    assert {0, 4} <= set(lengths) <= {0, 1, 2, 4}
    assert all(len(set(lengths[i : i + 4])) == 1 for i in range(0, 400, 4))


@pytest.mark.parametrize("in_a_trial", [False, True])
def test_a_pause_between_requests_is_nobodys_step(scheduler, in_a_trial):
    """It neither pays for trials, nor is a trial charged for it."""
    adaptive = scheduler.lengths._adaptive
    scheduler.serve("a")
    for _ in range(400):
        scheduler.step()
    while adaptive.is_trying != in_a_trial:
        scheduler.step()
    before = adaptive._credit
    scheduler.now += 3600
    scheduler.serve("b")
    for _ in range(8):
        scheduler.step()
    assert abs(adaptive._credit - before) < 2
    assert adaptive.times.estimate(1).tolist() == [1.0] * 5


def test_a_failure_ends_drafts_and_not_the_engine(scheduler, monkeypatch):
    scheduler.serve("a")
    monkeypatch.setattr(scheduler.lengths._adaptive, "choose", None)
    assert scheduler.step() == 0
    assert scheduler.lengths._faults.num_faults == 1
