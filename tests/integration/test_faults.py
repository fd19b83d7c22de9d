"""What goes wrong in drafting for one request costs that request's drafts alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.adapter import Engine, Request
from tests.support.engines import DRAFTER, Job, book_tokens, run_jobs
from tests.support.policies import (
    CORRUPTS_THE_TABLE,
    EXHAUSTS_THE_POOL,
    FAILS_ON_LONG_PROMPTS,
    KEEPS_TOO_MUCH,
    POISONS_LONG_PROMPTS,
)
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer

pytestmark = pytest.mark.vllm

PROMPT_TOKENS = {"short": 40, "long": 800, "other": 90}
MAX_MODEL_LEN = 1024
SETTINGS = {"num_slots": 3, "max_model_len": MAX_MODEL_LEN, "kv_budget": 40}


def started(folder: Path, policy: str) -> Engine:
    engine = Engine(folder, eviction_policy=policy, **SETTINGS)
    for name, num_tokens in PROMPT_TOKENS.items():
        engine.start(name, num_tokens)
    return engine


@pytest.fixture
def others_drafts(drafter_folder) -> list[dict[str, list[int]]]:
    """What the other two draft if the long one is never there."""
    engine = started(drafter_folder, FAILS_ON_LONG_PROMPTS)
    engine.finish("long")
    return [engine.step() for _ in range(5)]


def step_failing(monkeypatch, where: str, fails) -> None:
    original = getattr(DraftProposer, where)

    def wrapped(self, *args, **kwargs):
        fails(self, *args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DraftProposer, where, wrapped)


@pytest.fixture
def log(monkeypatch) -> Iterator[list[str]]:
    from vllm_budgetdraft.vllm_integration import faults

    lines: list[str] = []
    for level in ("error", "warning"):
        monkeypatch.setattr(
            faults.logger, level, lambda text, *args, **kw: lines.append(text % args)
        )
    yield lines


@pytest.mark.parametrize(
    "policy", [FAILS_ON_LONG_PROMPTS, KEEPS_TOO_MUCH, POISONS_LONG_PROMPTS]
)
def test_others_draft_as_if_the_faulty_one_were_not_there(
    policy, drafter_folder, others_drafts, log
):
    engine = started(drafter_folder, policy)
    for expected in others_drafts:
        drafts = engine.step()
        assert drafts.pop("long") == []
        assert drafts == expected
    # It was tried once, and said once.
    assert engine.proposer._drafting._faults.num_faults == len(log) == 1
    assert "request long" in log[0]
    for name in list(engine.requests):
        engine.finish(name)
    engine.step()
    engine.core.cache.check_invariants()
    assert engine.core.cache.pool.num_free == engine.core.cache.pool.num_pages


def test_whoever_has_no_drafts_is_counted_by_reason(drafter_folder):
    engine = Engine(
        drafter_folder,
        eviction_policy=FAILS_ON_LONG_PROMPTS,
        draft_prefill_chunk=100,
        # Of a bit more than two requests.
        pool_memory_gib=2.5 * (304 * 480) / 2**30,
        **SETTINGS,
    )

    def skipped() -> dict[str, float]:
        engine.step()
        counts = engine.proposer.take_statistics()["counts"]
        return {label: n for name, label, n in counts if name == "drafts_skipped"}

    engine.start("off", 10)
    engine.requests["off"] = Request(num_speculative_tokens=0)
    engine.start("short", 40)
    engine.start("other", 90)
    assert skipped() == {"off": 1, "reading": 1}
    engine.start("third", 40)
    assert skipped() == {"off": 1, "no_pages": 1}
    for name in ("third", "other", "short"):
        engine.finish(name)
    engine.start("long", 800)
    for _ in range(7):
        assert skipped() == {"off": 1, "reading": 1}
    for _ in range(2):
        assert skipped() == {"off": 1, "failed": 1}
    engine.start("end", MAX_MODEL_LEN)
    assert skipped() == {"off": 1, "failed": 1, "max_model_len": 1}


def test_not_a_number_does_not_reach_who_holds_its_pages_next(
    drafter_folder, others_drafts
):
    engine = Engine(drafter_folder, eviction_policy=POISONS_LONG_PROMPTS, **SETTINGS)
    for _ in range(3):  # every slot's pages are poisoned in turn
        engine.start("long", PROMPT_TOKENS["long"])
        assert engine.step() == {"long": []}
        engine.finish("long")
    for pages in (engine.core.cache.pool.keys, engine.core.cache.pool.values):
        assert bool(pages.isfinite().all())
    engine.start("short", PROMPT_TOKENS["short"])
    engine.start("other", PROMPT_TOKENS["other"])
    assert engine.step() == others_drafts[0]


def test_an_id_that_failed_drafts_again_for_another_request(drafter_folder):
    engine = started(drafter_folder, FAILS_ON_LONG_PROMPTS)
    assert engine.step()["long"] == []
    engine.finish("long")
    engine.requests["long"] = Request()
    engine.tokens["long"] = [3] * 50
    assert len(engine.step()["long"]) == 4


def test_a_step_that_fails_for_one_is_repeated_for_each(
    drafter_folder, others_drafts, monkeypatch, log
):
    engine = started(drafter_folder, "keep_all")
    engine.step()
    slot = engine.proposer._drafting._slots.get("long", engine.requests["long"]).slot

    def fails(core, slots, *rest):
        if slot in slots.tolist():
            raise RuntimeError("this slot fails on purpose")

    step_failing(monkeypatch, "draft", fails)
    drafts = engine.step()
    assert drafts["long"] == []
    assert len(drafts["short"]) == len(drafts["other"]) == 4
    assert log == [log[0]]
    assert "request long" in log[0]
    assert "this slot fails on purpose" in log[0]


@pytest.mark.parametrize("num_failures", [1, 2, 3, 7])
def test_after_a_failure_of_no_request_all_begin_anew_but_not_for_ever(
    drafter_folder, monkeypatch, num_failures
):
    """Each costs them all that they have read; of three in a row they draft no more."""
    from vllm_budgetdraft.vllm_integration.v1.own_cache_drafting import OwnCacheDrafting

    engine = started(drafter_folder, "sink_window")
    engine.step()
    nothing = dict.fromkeys(engine.requests, [])

    def fail(_, ready, limit):
        if ready:
            raise RuntimeError("on purpose")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(OwnCacheDrafting, "_draft_ready", fail)
        for _ in range(num_failures):
            assert engine.step() == nothing
    if num_failures < 3:
        assert len(engine.step()["short"]) == 4
    else:
        assert engine.proposer._drafting._faults.num_faults == 3
        assert engine.step() == nothing
    engine.finish("other")
    engine.start("new", 30)
    assert len(engine.step()["new"]) == 4
    engine.core.cache.check_invariants()


def test_a_full_pool_costs_drafts_until_there_is_room(drafter_folder, log):
    engine = Engine(drafter_folder, eviction_policy="keep_all", **SETTINGS)
    pool = engine.core.cache.pool
    taken = pool.take(pool.num_pages)
    engine.start("short", PROMPT_TOKENS["short"])
    assert engine.step() == {"short": []}
    assert "pages asked for" in log[0]
    pool.give_back(taken)
    assert len(engine.step()["short"]) == 4
    engine.core.cache.check_invariants()


def test_a_corrupted_table_ends_the_drafting_of_its_request(
    drafter_folder, others_drafts, monkeypatch, log
):
    monkeypatch.setenv("BUDGETDRAFT_CHECK_INVARIANTS", "1")
    engine = started(drafter_folder, "sink_window")
    engine.step()
    slot = engine.proposer._drafting._slots.get("long", engine.requests["long"]).slot
    engine.core.cache.page_table.pages[slot, 0] += 1
    drafts = engine.step()
    assert drafts["long"] == []
    assert len(drafts["short"]) == len(drafts["other"]) == 4
    assert "request long" in log[0]
    assert f"slot {slot} lists pages" in log[0]
    engine.core.cache.check_invariants()


@pytest.mark.parametrize("at", [0, 3])
def test_graphs_that_cannot_be_captured_are_done_without(drafter_folder, log, at):
    """At once, or when some were captured already."""
    from vllm_budgetdraft.vllm_integration.core_loader import capture_graphs

    captured = []

    def capture(function):
        if len(captured) == at:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.append(function)
        return lambda: pytest.fail("a graph of an incomplete set was replayed")

    engine = started(drafter_folder, "sink_window")
    expected = [engine.step() for _ in range(3)]
    engine = started(drafter_folder, "sink_window")
    capture_graphs(engine.core, capture)
    assert [engine.step() for _ in range(3)] == expected
    assert "RuntimeError: operation not permitted when stream" in log[0]


def test_every_failure_is_counted_and_ever_fewer_are_logged(log):
    from vllm_budgetdraft.vllm_integration.faults import FaultLog
    from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics

    statistics = DraftStatistics()
    faults = FaultLog(statistics)
    for _ in range(100):
        faults.report("request 1", ZeroDivisionError("why"))
    assert faults.num_faults == 100
    assert statistics.take()["counts"] == [["draft_faults", "ZeroDivisionError", 100]]
    assert [line.split("(")[1].split(" ")[0] for line in log] == [
        "1", "2", "4", "8", "16", "32", "64",
    ]  # fmt: skip


#: One by one, so that it is seen which drafted.
JOBS = {
    str(n): Job([book_tokens(n, start=n)], {"max_tokens": 40, "ignore_eos": True})
    for n in (50, 900, 80)
}


@pytest.fixture(scope="module")
def plain() -> dict[str, list[list[int]]]:
    answers = run_jobs({"max_model_len": MAX_MODEL_LEN}, JOBS)
    return {name: answer.token_ids for name, answer in answers.items()}


@pytest.mark.parametrize(
    ("policy", "drafts_of_900", "drafts_of_80"),
    [
        pytest.param(FAILS_ON_LONG_PROMPTS, False, True, id="raises"),
        pytest.param(POISONS_LONG_PROMPTS, False, True, id="poisons"),
        pytest.param(KEEPS_TOO_MUCH, False, True, id="keeps_too_much"),
        # Found before its second draft.
        pytest.param(CORRUPTS_THE_TABLE, True, True, id="corrupts"),
        # It has its own pages by then.
        pytest.param(EXHAUSTS_THE_POOL, True, False, id="exhausts"),
    ],
)
def test_in_a_real_engine_faults_cost_no_token(
    policy, drafts_of_900, drafts_of_80, plain, monkeypatch
):
    monkeypatch.setenv("BUDGETDRAFT_CHECK_INVARIANTS", "1")
    settings = {
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "model": DRAFTER,
        "num_speculative_tokens": 5,
        "kv_budget": 128,
        "draft_prefill_chunk": 512,  # as long as the prompt that warms up
        "eviction_policy": policy,
    }
    engine_args = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 1,
        "speculative_config": settings,
    }
    answers = run_jobs(engine_args, JOBS)
    assert {name: a.token_ids for name, a in answers.items()} == plain
    drafted = {name: a.num_draft_tokens for name, a in answers.items()}
    assert drafted["50"] > 10
    assert bool(drafted["900"]) == drafts_of_900, drafted
    assert bool(drafted["80"]) == drafts_of_80, drafted
    if policy == CORRUPTS_THE_TABLE:
        assert drafted["900"] == 5
