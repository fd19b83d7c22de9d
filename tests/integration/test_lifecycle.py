"""Whatever vLLM does to a request, its tokens are plain vLLM's, and drafting goes on.

Greedy, in float32. After each script of requests, every page of the draft cache must be
free, and nothing may have failed in drafting. Two drafting engines play them: in one,
the target drafts for itself with its whole context, so that any cache which is not that
of its request shows in a refused draft; the other has the real drafter on a small
budget. Both have so few KV blocks that long requests preempt each other.
"""

import json
from collections.abc import Iterator

import pytest

from tests.support.adapters import write_adapter
from tests.support.engine_settings import (
    BUDGETED,
    COMMON,
    FEW_BLOCKS,
    MAX_MODEL_LEN,
    NUM_DRAFTS,
    draft,
)
from tests.support.engines import (
    TARGET,
    EngineProcess,
    Request,
    SteppedEngine,
    book_tokens,
    engine_process,
)
from tests.support.scripts import (
    aborts,
    all_at_once,
    at_random,
    check,
    conversations,
    gains_after,
    ids_and_embeddings,
    instructions,
    long_prompt_later,
    low_priority_first,
    of_book,
    one_id_again_and_again,
    the_same_beginnings,
)
from vllm_budgetdraft.errors import UnsupportedVllmError

pytestmark = pytest.mark.vllm

#: Ends a sentence; beside </s>, the engines end a request at it.
PERIOD = 16

EXTRAS = {
    "enable_prompt_embeds": True,
    "enable_lora": True,
    "max_lora_rank": 8,
    # On a CPU, vLLM gives a request without an adapter the last place's: keep it empty.
    "max_loras": 2,
}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("generation_config")
    ends = {"eos_token_id": [1, PERIOD]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return COMMON | {"generation_config": str(folder)}


@pytest.fixture(scope="module")
def plain(common: dict) -> Iterator[EngineProcess]:
    with engine_process(common | EXTRAS) as engine:
        yield engine


@pytest.fixture(scope="module")
def self_drafting(common: dict) -> Iterator[EngineProcess]:
    settings = draft(model=TARGET, kv_budget=MAX_MODEL_LEN, draft_prefill_chunk=200)
    with engine_process(common | FEW_BLOCKS | settings) as engine:
        yield engine


@pytest.fixture(scope="module")
def budgeted(common: dict) -> Iterator[EngineProcess]:
    with engine_process(common | FEW_BLOCKS | EXTRAS | draft(**BUDGETED)) as engine:
        yield engine


def test_preempted_requests_draft_on_where_they_were(self_drafting, plain):
    requests = [of_book(350, 150, start=300 * i) for i in range(4)]
    played = self_drafting.play(all_at_once, requests)
    preempted = [course for course in played.courses if course.num_preemptions]
    assert preempted
    assert not any(course.num_slots_lost for course in preempted)
    check(played, plain, refused=0.01)


def test_a_preempted_request_drafts_again_after_its_slot_went_to_another(
    self_drafting, plain
):
    played = self_drafting.play(low_priority_first)
    lost = [course for course in played.courses if course.num_slots_lost]
    assert lost
    for course in lost:
        assert course.num_preemptions
        assert max(course.gains[-5:]) == NUM_DRAFTS + 1
    check(played, plain, refused=0.01)


def test_aborts_in_prefill_and_in_decode_leave_nothing_behind(
    self_drafting, budgeted, plain
):
    check(self_drafting.play(aborts), plain, refused=0.01)
    check(budgeted.play(aborts), plain)


def test_a_conversation_is_read_on_where_it_ended(self_drafting, budgeted, plain):
    check(self_drafting.play(conversations), plain, refused=0.1)
    check(budgeted.play(conversations), plain)


def test_a_beginning_that_calls_share_is_read_twice(self_drafting, budgeted, plain):
    # Of a call that was kept whole, as far as they are the same.
    played = self_drafting.play(instructions, [0, 300, 300, 300])
    check(played, plain, refused=0.1)
    # As far as vLLM's blocks of 32 tokens go.
    check(budgeted.play(instructions, [0, 0, 288, 288]), plain)


def test_an_id_used_again_at_once_is_another_request(self_drafting, plain):
    played = self_drafting.play(one_id_again_and_again)
    assert [course.name for course in played.courses].count("id") == 4
    check(played, plain, refused=0.01)


def test_rows_that_move_draft_on(self_drafting, plain):
    lengths = (3, 60, 25, 90, 7, 41, 1, 33, 70, 12)
    requests = [of_book(20 + 9 * n, n, 50 * i) for i, n in enumerate(lengths)]
    played = self_drafting.play(all_at_once, requests)
    assert sum(len(course.rows) > 1 for course in played.courses) >= 2
    check(played, plain, refused=0.01)


def test_chunks_of_a_prompt_and_drafts_share_steps(self_drafting, budgeted, plain):
    check(self_drafting.play(long_prompt_later), plain, refused=0.01)
    check(budgeted.play(long_prompt_later), plain)


def test_cached_prefixes_are_read_by_the_drafter_all_the_same(
    self_drafting, budgeted, plain
):
    for engine, refused in ((self_drafting, 0.01), (budgeted, 1.0)):
        played = engine.play(the_same_beginnings)
        assert [c.num_cached_tokens for c in played.courses[1:]] == [672, 512]
        assert all(max(course.gains) > 1 for course in played.courses)
        check(played, plain, refused=refused)


STOPS = {
    "stop strings": {"stop": [" the", " and"]},
    "a stop token": {"stop_token_ids": [14], "ignore_eos": True},
    "end of sequence": {},
}


@pytest.mark.parametrize("sampling", STOPS.values(), ids=STOPS)
def test_a_stop_inside_an_accepted_draft_ends_the_output_there(
    sampling, self_drafting, plain
):
    requests = [
        Request(book_tokens(80, start=120 * i), {"max_tokens": 60, **sampling})
        for i in range(8)
    ]
    played = self_drafting.play(all_at_once, requests)
    stopped = [c for c in played.courses if c.finish_reason == "stop"]
    assert any(1 < course.gains[-1] <= NUM_DRAFTS for course in stopped)
    check(played, plain)


def test_max_tokens_inside_an_accepted_draft_is_the_end(self_drafting, plain):
    requests = [of_book(80, n, start=120 * n) for n in range(1, 10)]
    played = self_drafting.play(all_at_once, requests)
    assert [len(c.token_ids) for c in played.courses] == list(range(1, 10))
    check(played, plain, refused=0.01)


def test_several_outputs_of_one_prompt_end_and_leave_nothing_behind(budgeted):
    """Their tokens are not compared, nor those of a neighbour.

    vLLM refuses n > 1 at temperature 0. Above it, on a CPU, whatever is in the batch
    comes out wrong under any speculation, ngram too (vLLM issue 55005).
    """
    sampling = {"max_tokens": 50, "n": 3, "temperature": 0.01, "ignore_eos": True}
    played = budgeted.play(all_at_once, [Request(book_tokens(200), sampling)] * 2)
    for course in played.courses:
        assert sorted(course.outputs) == [0, 1, 2]
        assert {len(tokens) for tokens in course.outputs.values()} == {50}
    assert played.drafted > 0


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "place": {"enum": ["the house", "the garden", "the ship"]},
    },
    "required": ["name", "age", "place"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json": {"json": PERSON},
    "regex": {"regex": r"(He|She|It) was [a-z ]{40,60}, and [a-z ]{20,40}\."},
    "choice": {"choice": ["the old man and the sea", "the old woman", "nobody"]},
}


def test_structured_outputs_are_plain_vllms(self_drafting, budgeted, plain):
    requests = [of_book(90, 60, start=10)]
    for i, grammar in enumerate(GRAMMARS.values()):
        sampling = {"max_tokens": 100, "structured_outputs": grammar}
        requests.append(Request(book_tokens(150, start=200 * i), sampling))
    for engine in (self_drafting, budgeted):
        played = engine.play(all_at_once, requests)
        _, person, sentence, choice = played.courses
        assert json.loads(person.text).keys() == {"name", "age", "place"}
        assert choice.text in GRAMMARS["choice"]["choice"]
        assert max(sentence.gains) > 1
        check(played, plain)


def test_prompts_of_embeddings_do_no_harm(budgeted, plain):
    played = budgeted.play(ids_and_embeddings)
    check(played, plain)
    ids = next(course for course in played.courses if course.name == "ids")
    assert max(gains_after(ids, 20)) > 1
    as_ids = [of_book(150, 60, start=400), of_book(300, 40, start=700)]
    expected = plain.play(all_at_once, as_ids).courses
    for course, plain_course in zip(played.courses[2:], expected, strict=True):
        assert course.token_ids == plain_course.token_ids


def test_nothing_is_drafted_from_the_ids_that_embeddings_do_not_have(budgeted):
    """vLLM leaves in their row the ids of the request that had it before."""
    embeddings = of_book(150, 60, start=400, as_embeddings=True)
    assert budgeted.play(all_at_once, [embeddings]).drafted == 0


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_adapter(tmp_path_factory.mktemp("adapter"), TARGET)


def test_a_target_with_an_adapter_beside_one_without(budgeted, plain, adapter):
    requests = [
        of_book(100, 60, start=50),
        of_book(100, 60, start=50, adapter=adapter),
        of_book(300, 60, start=350, adapter=adapter),
    ]
    played = budgeted.play(all_at_once, requests)
    assert played.courses[0].token_ids != played.courses[1].token_ids
    check(played, plain)


def asking(**extra_args: int) -> Request:
    """A request for which drafting is to do less."""
    request = of_book(200, 60, start=150)
    request.sampling["extra_args"] = extra_args
    return request


def test_a_request_that_asks_for_no_drafts_gets_none_beside_one_that_drafts(
    budgeted, plain
):
    requests = [asking(num_speculative_tokens=0), of_book(120, 60, start=60)]
    played = budgeted.play(all_at_once, requests)
    assert set(played.courses[0].gains) == {1}
    assert max(played.courses[1].gains) > 1
    check(played, plain)


def test_a_request_may_ask_for_fewer_drafts_and_a_smaller_budget(budgeted, plain):
    requests = [asking(num_speculative_tokens=2, kv_budget=32), asking(kv_budget=40)]
    played = budgeted.play(all_at_once, requests)
    assert max(played.courses[0].gains) == 3
    assert max(played.courses[1].gains) > 3
    check(played, plain)


def too_much(engine: SteppedEngine) -> None:
    for extra_args in ({"kv_budget": 97}, {"num_speculative_tokens": NUM_DRAFTS + 1}):
        with pytest.raises(ValueError, match="this server allows"):
            engine.add("refused", asking(**extra_args))
    engine.add("next", of_book(80, 20))


def test_a_request_that_asks_for_more_is_refused_and_the_next_is_served(
    budgeted, plain
):
    check(budgeted.play(too_much), plain)


def deep_sleep(engine: SteppedEngine) -> None:
    with pytest.raises(UnsupportedVllmError, match="sleep level 2.*use level 1"):
        engine.sleep(level=2)
    engine.add("after it", of_book(80, 20))


def test_sleep_that_would_lose_the_drafters_weights_is_refused(budgeted, plain):
    check(budgeted.play(deep_sleep), plain)


@pytest.mark.parametrize("drafting", ["self_drafting", "budgeted"])
def test_random_lives(drafting, plain, request):
    """Until one request was preempted and one aborted; drafts decide in which life."""
    engine = request.getfixturevalue(drafting)
    seen = set()
    for seed in range(5, 13):
        played = engine.play(at_random, seed)
        check(played, plain, refused=0.01 if drafting == "self_drafting" else 1.0)
        seen |= {"preempted" for course in played.courses if course.num_preemptions}
        seen |= {"aborted" for c in played.courses if c.finish_reason is None}
        if seen == {"preempted", "aborted"}:
            return
    assert seen == {"preempted", "aborted"}
