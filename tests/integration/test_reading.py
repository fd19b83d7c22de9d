"""Prompts are read a share in each step, and nobody waits for another's."""

import pytest
import torch

from tests.support.adapter import Engine
from vllm_budgetdraft.proposer.prompt_reader import PromptReader

pytestmark = pytest.mark.vllm

CHUNK = 100
SETTINGS = {
    "num_slots": 3,
    "max_model_len": 1024,
    "kv_budget": 64,
    "draft_prefill_chunk": CHUNK,
}
READING = pytest.mark.parametrize("draft_prefill", ["full", "streaming"])


@pytest.fixture
def engine(drafter_folder) -> Engine:
    return Engine(drafter_folder, **SETTINGS)


@pytest.fixture
def read_per_step(monkeypatch) -> list[int]:
    """Append 0 before a step; afterwards it is the number of tokens read in it."""
    counts: list[int] = []
    original = PromptReader._pass

    def read(self, pieces, tokens, features):
        counts[-1] += len(tokens)
        return original(self, pieces, tokens, features)

    monkeypatch.setattr(PromptReader, "_pass", read)
    return counts


def steps(engine: Engine, count: int, read_per_step: list[int]) -> list[dict]:
    drafted = []
    for _ in range(count):
        read_per_step.append(0)
        drafted.append(engine.step())
    return drafted


def test_a_long_prompt_is_read_over_steps_in_which_others_draft(engine, read_per_step):
    engine.start("short", 30)
    engine.start("long", 350)
    drafted = steps(engine, 6, read_per_step)
    # 28 of the short one and then 72, 100, 100 of the long one, and what is left of it.
    assert read_per_step == [100, 100, 100, 76, 0, 0]
    assert [bool(each["short"]) for each in drafted] == [True] * 6
    assert [bool(each["long"]) for each in drafted] == [False] * 3 + [True] * 3


@READING
def test_reading_in_shares_drafts_what_reading_at_once_does(
    drafter_folder, draft_prefill, read_per_step
):
    """Alone, so that streaming's chunks are the same ones."""
    shares = Engine(drafter_folder, draft_prefill=draft_prefill, **SETTINGS)
    shares.start("long", 350)
    shares.prefilling = {"long"}
    assert not any(each["long"] for each in steps(shares, 4, read_per_step))
    assert sum(read_per_step) == 349
    shares.prefilling = set()
    shares.tokens["long"].append(5)

    once = Engine(drafter_folder, draft_prefill=draft_prefill, **SETTINGS)
    context = torch.tensor(shares.tokens["long"])
    once.core.start_request(0)
    once.core.ingest(0, context[:-2])
    expected = once.core.draft(
        torch.tensor([0]), context[None, -2:], torch.tensor([len(context)])
    )
    assert steps(shares, 1, read_per_step)[0]["long"] == expected.tokens[0].tolist()
    assert read_per_step[-1] == 0


def test_a_prompt_that_is_prefilled_slowly_is_read_by_the_first_token(
    engine, read_per_step
):
    engine.start("long", 150)
    engine.start("next", 120)
    engine.prefilling = {"long", "next"}
    steps(engine, 4, read_per_step)
    assert read_per_step == [100, 100, 68, 0]
    engine.prefilling = set()
    for name in ("long", "next"):
        engine.tokens[name].append(5)
    assert all(steps(engine, 1, read_per_step)[0].values())
    assert read_per_step[-1] == 0


def test_a_half_read_prompt_that_waits_lets_others_read_and_begins_anew(
    engine, read_per_step
):
    engine.start("first", 300)
    engine.start("second", 150)
    steps(engine, 1, read_per_step)
    engine.waiting = {"first"}
    drafted = steps(engine, 2, read_per_step)
    assert read_per_step == [100, 100, 48]
    assert drafted[-1]["second"]
    engine.waiting = set()
    drafted = steps(engine, 4, read_per_step)
    assert [bool(each["first"]) for each in drafted] == [False, False, True, True]
    engine.core.cache.check_invariants()


def test_a_prompt_that_ends_half_read_leaves_nothing_behind(engine, read_per_step):
    engine.start("first", 300)
    steps(engine, 1, read_per_step)
    engine.finish("first")
    engine.start("second", 80)
    assert steps(engine, 1, read_per_step)[0]["second"]
    engine.finish("second")
    steps(engine, 1, read_per_step)
    cache = engine.core.cache
    cache.check_invariants()
    assert cache.pool.num_free == cache.pool.num_pages
