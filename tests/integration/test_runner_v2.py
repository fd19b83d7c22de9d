"""In vLLM's model runner V2, as in V1: the tokens are plain vLLM's, and drafts go on.

On a CPU that runner's kernels run in Triton's interpreter. Scheduling is asynchronous:
the engine schedules a step before it knows what the last one accepted.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.integration import test_lifecycle as lifecycle
from tests.support.engine_settings import (
    BUDGETED,
    COMMON,
    FEW_BLOCKS,
    MAX_MODEL_LEN,
    NUM_DRAFTS,
    draft,
)
from tests.support.engines import (
    DRAFTER,
    TARGET,
    EngineProcess,
    SteppedEngine,
    engine_process,
)
from tests.support.policies import FAILS_ON_LONG_PROMPTS, POISONS_LONG_PROMPTS
from tests.support.runner_v2 import interpret_kernels, schedule_ahead
from tests.support.scripts import all_at_once, check, counted_metrics, of_book

pytestmark = pytest.mark.vllm

#: That schedule ahead, and that do not.
ENGINES = [schedule_ahead, pytest.param(interpret_kernels, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def plain() -> Iterator[EngineProcess]:
    with engine_process(COMMON) as engine:
        yield engine


@pytest.fixture(scope="module")
def self_drafting() -> Iterator[EngineProcess]:
    """Which reads a prompt at once: until then, drafts would be refused."""
    settings = draft(
        model=TARGET, kv_budget=MAX_MODEL_LEN, draft_prefill_chunk=MAX_MODEL_LEN
    )
    with engine_process(COMMON | FEW_BLOCKS | settings, schedule_ahead) as engine:
        yield engine


@pytest.fixture(scope="module")
def budgeted() -> Iterator[EngineProcess]:
    settings = COMMON | FEW_BLOCKS | draft(**BUDGETED)
    with engine_process(settings, schedule_ahead) as engine:
        yield engine


# The scripts of V1, on the engines of this module.
test_prefixes = lifecycle.test_cached_prefixes_are_read_by_the_drafter_all_the_same
test_chunks = lifecycle.test_chunks_of_a_prompt_and_drafts_share_steps
test_conversations = lifecycle.test_a_conversation_is_read_on_where_it_ended
test_max_tokens = lifecycle.test_max_tokens_inside_an_accepted_draft_is_the_end
test_grammars = lifecycle.test_structured_outputs_are_plain_vllms
test_no_drafts = (
    lifecycle.test_a_request_that_asks_for_no_drafts_gets_none_beside_one_that_drafts
)
test_less = lifecycle.test_a_request_may_ask_for_fewer_drafts_and_a_smaller_budget
test_too_much = (
    lifecycle.test_a_request_that_asks_for_more_is_refused_and_the_next_is_served
)


@pytest.mark.slow
def test_instructions(self_drafting, budgeted, plain):
    lifecycle.test_a_beginning_that_calls_share_is_read_twice(
        self_drafting, budgeted, plain
    )


@pytest.mark.slow
def test_aborts(self_drafting, budgeted, plain):
    lifecycle.test_aborts_in_prefill_and_in_decode_leave_nothing_behind(
        self_drafting, budgeted, plain
    )


@pytest.mark.slow
@pytest.mark.parametrize("drafting", ["self_drafting", "budgeted"])
def test_random_lives(drafting, plain, request):
    lifecycle.test_random_lives(drafting, plain, request)


def is_v2_and_ahead(engine: SteppedEngine) -> None:
    module = type(engine._runner).__module__
    assert module == "vllm.v1.worker.cpu.model_runner", module
    assert engine.schedules_ahead


def test_these_engines_are_what_they_say(self_drafting):
    self_drafting.play(is_v2_and_ahead)


def checking_what_is_counted(engine: SteppedEngine, requests: list) -> None:
    all_at_once(engine, requests)
    engine.finish()
    counted = counted_metrics()
    pool = engine._drafter._core.cache.pool
    assert counted["pages_in_use"] + counted["pages_free"] == pool.num_pages
    assert counted["draft_length"] == NUM_DRAFTS
    assert counted["draft_steps_total"] >= 4
    assert counted["draft_seconds_total"] > 0
    assert counted["evicted_tokens_total"] >= 100
    assert counted["draft_faults_total"] == 0
    engine.become_idle()
    assert counted_metrics()["pages_in_use"] == 0


def test_what_it_does_is_counted_though_nothing_waits_for_the_device(budgeted, plain):
    requests = [of_book(600, 16), of_book(40, 8, 900)]
    check(budgeted.play(checking_what_is_counted, requests), plain)


def most_verified(
    engine: SteppedEngine, requests: list, most: list[int], is_patched: bool
) -> None:
    """Fails unless each request has as many drafts verified at once, and never more."""
    from vllm_budgetdraft.vllm_integration.scheduler import DraftScheduler
    from vllm_budgetdraft.vllm_integration.v2.runner import DraftingRunner

    scheduler, runner, found = engine._scheduler, engine._runner, [0] * len(requests)
    schedule = scheduler.schedule
    if not is_patched:
        schedule = super(DraftScheduler, scheduler).schedule
        theirs = super(DraftingRunner, runner).take_draft_token_ids
        runner.take_draft_token_ids = theirs

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        for name, tokens in output.scheduled_spec_decode_tokens.items():
            index = int(name.removeprefix("request "))
            found[index] = max(found[index], len(tokens))
        return output

    scheduler.schedule = watched
    all_at_once(engine, requests)
    engine.finish()
    del scheduler.schedule
    assert found == most, found


@pytest.mark.parametrize("prepare", [schedule_ahead, interpret_kernels])
def test_a_request_has_no_more_drafts_verified_than_it_may_have(prepare, plain):
    """Without the patches all have as many."""
    requests = [of_book(60 + i, 30, 200 * i) for i in range(4)]
    requests[1].sampling["extra_args"] = {"num_speculative_tokens": 2}
    requests[2].sampling["extra_args"] = {"num_speculative_tokens": 0}
    requests[3] = replace(requests[3], as_embeddings=True)
    settings = COMMON | {"enable_prompt_embeds": True} | draft(**BUDGETED)
    with engine_process(settings, prepare) as engine:
        most = [NUM_DRAFTS, 2, 0, 0]
        played = engine.play(most_verified, requests, most, True)
        engine.play(most_verified, requests, [NUM_DRAFTS] * 4, False)
    played.courses.pop()  # of embeddings, which the plain engine does not take
    check(played, plain)


BIASES = {
    "logit_bias": {"logit_bias": {14: 3.0, 300: -100.0}},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    "min_tokens": {"min_tokens": 40, "ignore_eos": False},
    "bad_words": {"bad_words": [" the"]},
    "min_p": {"min_p": 0.1},
}


def test_what_changes_logits_changes_them_in_verification_too(budgeted, plain):
    requests = [of_book(80, 60, 200 * i) for i in range(len(BIASES))]
    for request, sampling in zip(requests, BIASES.values(), strict=True):
        request.sampling.update(sampling)
    check(budgeted.play(all_at_once, requests), plain)


def slow_reader(**settings: object) -> dict[str, object]:
    """Many steps behind a target that prefills at once, and drafting nevertheless."""
    settings = {"model": TARGET, "kv_budget": MAX_MODEL_LEN, **settings}
    return COMMON | draft(draft_prefill_chunk=60, **settings)


@pytest.mark.parametrize("prepare", ENGINES)
def test_who_reads_slowly_catches_up_with_tokens_that_nobody_counted(prepare, plain):
    """Nor does anybody know how many of the tokens verified meanwhile were accepted.

    Where the engine does not schedule ahead, none are verified meanwhile.
    """
    with engine_process(slow_reader(), prepare) as engine:
        played = engine.play(all_at_once, [of_book(400, 60), of_book(300, 60, 500)])
    check(played, plain, refused=1.0 if prepare is schedule_ahead else 0.0)
    for course in played.courses:
        assert course.gains[:5] == [1] * 5
        assert course.gains[-4:-1] == [NUM_DRAFTS + 1] * 3


def test_batches_too_large_for_drafts_leave_caches_that_catch_up(plain):
    """Two requests draft nothing; the one that stays drafts again, and rightly."""
    schedule = [[1, 1, NUM_DRAFTS], [2, 4, 0]]
    settings = slow_reader(num_speculative_tokens_per_batch_size=schedule)
    requests = [of_book(50, 120), of_book(40, 30, 300), of_book(45, 12, 600)]
    with engine_process(settings, schedule_ahead) as engine:
        played = engine.play(all_at_once, requests)
    check(played, plain, refused=0.05)
    assert set(played.courses[1].gains) == {1}
    assert played.courses[0].gains[-4:-1] == [NUM_DRAFTS + 1] * 3


@pytest.mark.slow
@pytest.mark.parametrize("policy", [FAILS_ON_LONG_PROMPTS, POISONS_LONG_PROMPTS])
def test_what_goes_wrong_for_one_request_costs_its_drafts_alone(policy, plain):
    settings = COMMON | draft(
        model=DRAFTER,
        eviction_policy=policy,
        kv_budget=300,
        draft_prefill_chunk=600,  # the start-up tries one such prompt
    )
    requests = [of_book(100, 40), of_book(800, 40, 90), of_book(120, 40, 300)]
    with engine_process(settings, schedule_ahead) as engine:
        played = engine.play(only_that_fails, requests)
    check(played, plain)
    short, long, other = (max(course.gains) for course in played.courses)
    assert short > 1
    assert other > 1
    assert long <= 2  # a last token may come again


def only_that_fails(engine: SteppedEngine, requests: list) -> None:
    all_at_once(engine, requests)
    engine.finish()
    faults = engine._drafter._faults
    assert faults.num_faults <= 1
    faults.num_faults = 0
    # The request by which the engine looks for leaks is long, too.
    engine._drafter._core.policy.select = lambda states, budget: states.all_positions()[
        ..., :budget
    ]


def watching_lengths(engine: SteppedEngine, requests: list) -> None:
    """Fails unless the engine chose lengths, and they were drafted and verified."""
    schedule = engine._scheduler.dynamic_sd_lookup
    look_up, lengths = type(schedule).__getitem__, []

    class Watched(type(schedule)):
        def __getitem__(self, batch_size: int) -> int:
            lengths.append(look_up(self, batch_size))
            return lengths[-1]

    schedule.__class__ = Watched
    all_at_once(engine, requests)
    engine.finish()
    assert {0, NUM_DRAFTS} <= set(lengths) <= {0, 1, 2, 3, 4, NUM_DRAFTS}, lengths
    times, acceptance = schedule._adaptive.times, schedule._adaptive.acceptance
    assert len(times.estimate(len(requests))) == NUM_DRAFTS + 1
    assert acceptance.chances(["another"])[0].sum() > 0.8 * NUM_DRAFTS


@pytest.mark.parametrize("prepare", ENGINES)
def test_lengths_that_the_scheduler_learns_are_drafted(prepare, plain):
    settings = COMMON | draft(
        model=TARGET, kv_budget=MAX_MODEL_LEN, adaptive_draft_length=True
    )
    with engine_process(settings, prepare) as engine:
        requests = [of_book(50 + 40 * i, 120, 300 * i) for i in range(3)]
        played = engine.play(watching_lengths, requests)
    check(played, plain)
