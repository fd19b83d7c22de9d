"""Requests of both model runners that go on from snapshots, with no engine."""

from types import SimpleNamespace

import pytest
import torch

from tests.support import models
from tests.support.adapter import Engine, Request
from tests.support.heads import write_head
from tests.support.speculator import NUM_DRAFTS, Runner
from tests.unit.test_feature_drafting import (
    Simulated,
    build,
    expected_drafts,
    step,
)
from vllm_budgetdraft.vllm_integration.remembering import Told

pytestmark = pytest.mark.vllm

SCOPE = Told(None, 0, 0)
SIZES = {
    "num_slots": 3,
    "max_model_len": 400,
    "eviction_policy": "keep_all",
    "position_mode": "absolute",
}


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter")
    return models.write_model(folder, models.llama(num_hidden_layers=2), seed=3)


def ask(engine: Engine, name: str, tokens: list[int], scope=SCOPE, **more) -> None:
    request = engine.requests[name] = Request(**more)
    request.budgetdraft_told, request.num_prompt_tokens = scope, len(tokens)
    engine.tokens[name] = list(tokens)


def counts(engine: Engine) -> dict[str, float]:
    """Of reading, since this was asked last."""
    taken = engine.proposer.take_statistics()["counts"]
    found = dict.fromkeys(("tokens_to_read", "snapshot_tokens"), 0.0)
    for name, _, amount in taken:
        if name in found:
            found[name] += amount
    return found


def talk(engine: Engine, num_steps: int = 4) -> dict[str, list[int]]:
    for _ in range(num_steps):
        drafts = engine.step()
    return drafts


def first_answer(engine: Engine, **more) -> list[int]:
    """A turn of a conversation, and what it came to."""
    ask(engine, "one", models.random_tokens(50, seed=1).tolist(), **more)
    talk(engine)
    context = engine.tokens["one"]
    engine.finish("one")
    counts(engine)
    return context


def test_the_next_turn_reads_what_is_new_and_drafts_as_if_it_read_all(drafter):
    engine, anew = Engine(drafter, **SIZES), Engine(drafter, **SIZES)
    context = first_answer(engine) + models.random_tokens(20, seed=2).tolist()
    for each in (engine, anew):
        ask(each, "two", context)
    assert talk(engine) == talk(anew)
    assert counts(engine) == {"tokens_to_read": 19, "snapshot_tokens": 53}
    assert counts(anew) == {"tokens_to_read": 72, "snapshot_tokens": 0}


@pytest.mark.parametrize(
    ("edited", "known"),
    [(60, 0), (53, 53), (51, 51), (20, 20), (None, 52)],
    ids=["beyond", "last", "answer", "question", "again"],
)
def test_a_context_that_differs_begins_where_it_does(drafter, edited, known):
    engine = Engine(drafter, **SIZES)
    context = first_answer(engine)
    if edited == 60:
        context, scope = [*context, 3, 4, 5], SCOPE._replace(salt="theirs")
    else:
        scope = SCOPE
        if edited is not None:
            context = [*context[:edited], (context[edited] + 1) % 97, 3, 4, 5]
    ask(engine, "two", context, scope)
    talk(engine)
    assert counts(engine)["snapshot_tokens"] == known


def test_snapshots_are_of_a_scope(drafter):
    engine = Engine(drafter, **SIZES | {"num_slots": 9})
    context = [*first_answer(engine), 3, 4, 5]
    others = {
        "salt": {"scope": SCOPE._replace(salt="theirs")},
        "unknown": {"scope": None},
        "budget": {"kv_budget": 128},
    }
    for name, more in others.items():
        ask(engine, name, context, **more)
        talk(engine)
        assert counts(engine)["snapshot_tokens"] == 0, name
        engine.finish(name)
    for name, attributes in {
        "adapter": {"lora_request": SimpleNamespace(lora_name="german")},
        "picture": {"mm_features": [SimpleNamespace(identifier="cat")]},
    }.items():
        ask(engine, name, context)
        vars(engine.requests[name]).update(attributes)
        talk(engine)
        assert counts(engine)["snapshot_tokens"] == 0, name
        engine.finish(name)
    ask(engine, "the same", context)
    talk(engine)
    assert counts(engine)["snapshot_tokens"] == 53
    # One that began before a reset and ends after it is of no use.
    ask(engine, "after a reset", context, SCOPE._replace(num_resets=1))
    talk(engine)
    assert counts(engine)["snapshot_tokens"] == 0
    engine.finish("the same")
    num_kept = len(engine.core.snapshots)
    talk(engine, 1)
    assert len(engine.core.snapshots) == num_kept
    ask(engine, "and again", context, SCOPE._replace(num_resets=1))
    talk(engine)
    assert counts(engine)["snapshot_tokens"] == 0


def test_without_memory_for_them_all_is_read(drafter):
    engine = Engine(drafter, **SIZES, snapshot_memory_gib=0)
    context = [*first_answer(engine), 3, 4, 5]
    ask(engine, "two", context)
    talk(engine)
    assert counts(engine) == {"tokens_to_read": 55, "snapshot_tokens": 0}


def test_what_failed_is_not_kept(drafter, monkeypatch):
    engine = Engine(drafter, **SIZES)
    ask(engine, "one", models.random_tokens(50, seed=1).tolist())
    talk(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.core, "draft", lambda *_, **__: 1 / 0)
        talk(engine, 1)
    engine.finish("one")
    talk(engine, 1)
    assert not len(engine.core.snapshots)
    assert engine.core.cache.pool.num_free == engine.core.cache.pool.num_pages


def test_who_needs_pages_gets_those_of_snapshots(drafter):
    engine = Engine(drafter, **SIZES | {"num_slots": 2})
    for turn in range(6):
        ask(engine, f"{turn}", models.random_tokens(40, seed=turn).tolist())
        drafts = talk(engine)
        assert all(drafts.values())
        if turn:
            engine.finish(f"{turn - 1}")
    assert engine.core.snapshots.num_evicted > 2
    engine.core.cache.check_invariants()


def test_what_ends_while_its_prompt_is_read_is_not_kept(drafter):
    engine = Engine(drafter, **SIZES)
    engine.core.step_tokens = 10
    ask(engine, "one", models.random_tokens(50, seed=1).tolist())
    talk(engine, 2)
    engine.finish("one")
    talk(engine, 1)
    assert not len(engine.core.snapshots)


# Model runner V2


def emitted(runner: Runner, index: int, rounds: int = 4) -> torch.Tensor:
    """What a request has written after some steps; the last drafts."""
    for each in range(rounds):
        if each:
            runner.emit(index, [each, each + 1])
        drafts = runner.propose([index], num_drafts=NUM_DRAFTS if each else 0)
    return drafts[0].clone()


def context_of(runner: Runner, index: int) -> torch.Tensor:
    end = int(runner.states.total_len.gpu[index])
    return runner.states.all_token_ids.gpu[index, :end].to(torch.int64)


@pytest.mark.parametrize("length", [NUM_DRAFTS, 0])
def test_in_v2_the_next_turn_reads_what_is_new(drafter, length):
    """Whether the last step drafted or not."""
    settings = {"eviction_policy": "keep_all", "draft_sample_method": "greedy"}
    runner, anew = Runner(drafter, **settings), Runner(drafter, **settings)
    runner.begin(1, models.random_tokens(50, seed=1), SCOPE)
    runner.emit(1, [5])
    emitted(runner, 1)
    runner.emit(1, [6])
    runner.propose([1], num_drafts=NUM_DRAFTS, length=length)
    context = torch.cat([context_of(runner, 1), models.random_tokens(20, seed=2)])
    runner.end(1)
    runner.speculator.release_ended()
    runner.speculator.take_statistics()
    for each in (runner, anew):
        each.begin(1, context, SCOPE)  # in the place of the one before
        each.emit(1, [7])
    assert emitted(runner, 1).tolist() == emitted(anew, 1).tolist()
    counted = runner.speculator.take_statistics()["counts"]
    known = sum(amount for name, _, amount in counted if name == "snapshot_tokens")
    assert known == (58 if length else 56)  # a step that does not draft feeds nothing
    runner.core.cache.check_invariants()


def test_in_v2_a_preempted_request_goes_on(drafter):
    runner = Runner(drafter)
    runner.begin(1, models.random_tokens(50, seed=1), SCOPE)
    runner.emit(1, [5])
    emitted(runner, 1)
    context = context_of(runner, 1)
    runner.end(1)
    runner.speculator.release_ended()
    runner.speculator.take_statistics()
    runner.begin(2, context, SCOPE)
    counted = runner.speculator.take_statistics()["counts"]
    known = sum(amount for name, _, amount in counted if name == "snapshot_tokens")
    assert known >= len(context) - 2


# Heads


def test_a_head_knows_what_its_target_does_not_compute_again(tmp_path):
    core = build(write_head(tmp_path, max_position_embeddings=512))
    engine = Simulated(core, 0)

    def state(name: str, num_tokens: int) -> None:
        made = engine.states[name] = Request()
        made.budgetdraft_told, made.num_prompt_tokens = SCOPE, num_tokens

    engine.contexts["one"] = models.random_tokens(41, seed=1).tolist()
    state("one", 40)
    step(engine, one=(0, 40, True))
    engine.contexts["one"] += [3]
    assert step(engine, one=(40, 1, True))
    engine.states["one"].output_token_ids = engine.contexts["one"][40:]
    following = [*engine.contexts["one"], *models.random_tokens(20, seed=2).tolist()]
    engine.drafter.forget_ended({})
    assert len(core.snapshots) == 1
    # What another request has computed, and no head has read, is a gap.
    engine.contexts["gap"] = following
    state("gap", 61)
    (drafts,) = step(engine, gap=(50, 11, True)).values()
    holding = engine.drafter._slots.get("gap", engine.states["gap"])
    assert len(drafts) == 3 and holding.origin == 0
    assert int(core.cache.num_evicted[holding.slot]) == 50 - 41
    engine.states.clear()
    engine.drafter.forget_ended({})
    core.snapshots._drop(list(core.snapshots._kept.values())[-1])  # that of the gap
    # The target knows whole blocks: it computes again from 32 on.
    for known, name in ((32, "exact"), (41, "to its end")):
        engine.contexts[name] = following
        state(name, 61)
        (drafts,) = step(engine, **{name: (known, 61 - known, True)}).values()
        assert drafts == expected_drafts(core.drafter, following, 0), name
        engine.drafter.forget_ended({})


def test_a_head_that_is_preempted_goes_on_with_what_it_knew(tmp_path):
    core = build(write_head(tmp_path, max_position_embeddings=512))
    engine = Simulated(core, 0)
    context = engine.contexts["one"] = models.random_tokens(41, seed=1).tolist()
    state = engine.states["one"] = Request()
    state.budgetdraft_told, state.num_prompt_tokens = SCOPE, 40
    step(engine, one=(0, 40, True))
    context += [3]
    assert step(engine, one=(40, 1, True))
    state.output_token_ids = context[40:]
    # vLLM has kept a block of 32 tokens, and computes the others again.
    context += [4]
    (drafts,) = step(engine, one=(32, 10, True)).values()
    assert drafts == expected_drafts(core.drafter, context, 0)


# Sessions, whose prompts grow while they live


def test_in_v1_a_session_leaves_nothing_that_is_wrong(drafter):
    engine = Engine(drafter, **SIZES)
    ask(engine, "one", models.random_tokens(50, seed=1).tolist())
    talk(engine)
    state, context = engine.requests["one"], engine.tokens["one"]
    context += models.random_tokens(20, seed=2).tolist()
    state.num_prompt_tokens, state.output_token_ids = len(context), []
    talk(engine)
    engine.finish("one")
    talk(engine, 1)
    assert not len(engine.core.snapshots)


def test_in_v2_a_session_drafts_on(drafter):
    """vLLM begins it anew, under its id, and in the same place."""
    runner = Runner(drafter)
    runner.begin(1, models.random_tokens(50, seed=1), SCOPE)
    runner.emit(1, [5])
    emitted(runner, 1)
    for _ in range(3):
        context = torch.cat([context_of(runner, 1), models.random_tokens(20, seed=2)])
        runner.speculator.take_statistics()
        runner.speculator.make_way([SimpleNamespace(req_id="request 1")])
        runner.begin(1, context, SCOPE)
        runner.emit(1, [7])
        drafts = runner.propose([1])
        assert runner.speculator.drafted == {"request 1"} and len(drafts[0])
        counted = runner.speculator.take_statistics()["counts"]
        assert "draft_faults" not in [name for name, _, _ in counted]
        runner.core.cache.check_invariants()
        kept = runner.core.cache._kept
        assert len(kept) == runner.core.snapshots.num_pages


def test_in_v2_what_fails_when_requests_end_costs_drafts_alone(drafter, monkeypatch):
    runner = Runner(drafter)
    runner.begin(1, models.random_tokens(50, seed=1), SCOPE)
    runner.emit(1, [5])
    emitted(runner, 1)
    runner.end(1)
    monkeypatch.setattr(runner.core.cache, "are_finite", lambda _: 1 / 0)
    runner.speculator.make_way([])
    cache = runner.core.cache
    assert cache.pool.num_free == cache.pool.num_pages
    counted = runner.speculator.take_statistics()["counts"]
    assert ["draft_faults", "ZeroDivisionError", 1] in counted
