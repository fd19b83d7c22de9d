"""Scripts of requests that engines play, and what must come of them."""

import random
from collections import Counter

from tests.support.engine_settings import NUM_DRAFTS
from tests.support.engines import (
    Course,
    EngineProcess,
    Played,
    Request,
    SteppedEngine,
    book_tokens,
)


def of_book(
    num_prompt: int, max_tokens: int, start: int = 0, **options: object
) -> Request:
    sampling = {"max_tokens": max_tokens, "ignore_eos": True}
    return Request(book_tokens(num_prompt, start), sampling, **options)


def all_at_once(engine: SteppedEngine, requests: list[Request]) -> None:
    for i, each in enumerate(requests):
        engine.add(f"request {i}", each)


def check(played: Played, plain: EngineProcess, *, refused: float = 1.0) -> None:
    """Every token is plain vLLM's; at most the share ``refused`` of drafts was wrong.

    Of an aborted request, the tokens up to there.
    """
    expected = plain.play(all_at_once, [c.request for c in played.courses]).courses
    for course, plain_course in zip(played.courses, expected, strict=True):
        if course.finish_reason is None:
            length = len(course.token_ids)
            assert course.token_ids == plain_course.token_ids[:length], course.name
            continue
        assert course.outputs == plain_course.outputs, course.name
        assert course.text == plain_course.text, course.name
        assert course.finish_reason == plain_course.finish_reason, course.name
    assert played.accepted > 0
    assert played.drafted - played.accepted <= refused * played.drafted


def counted_metrics() -> Counter[str]:
    """Ours, of the server that an engine here would be part of, summed over labels."""
    from prometheus_client import REGISTRY

    found: Counter[str] = Counter()
    for family in REGISTRY.collect():
        for metric in family.samples:
            found[metric.name.removeprefix("vllm_budgetdraft:")] += metric.value
    return found


def has_generated(course: Course, num_tokens: int):
    return lambda: len(course.token_ids) >= num_tokens


def gains_after(course: Course, num_tokens: int) -> list[int]:
    """What the steps brought once there were ``num_tokens``."""
    pairs = zip(course.lengths, course.gains, strict=True)
    return [gain for length, gain in pairs if length > num_tokens]


def low_priority_first(engine: SteppedEngine) -> None:
    low = [
        engine.add(f"low {i}", of_book(480, 150, start=500 * i, priority=1))
        for i in range(2)
    ]
    engine.step_until(has_generated(low[1], 20))
    for i in range(5):
        engine.add(f"high {i}", of_book(250, 100, start=200 * i + 90))


def aborts(engine: SteppedEngine) -> None:
    staying = [engine.add(f"staying {i}", of_book(60 + i, 120, 70 * i)) for i in (0, 1)]
    engine.step_until(has_generated(staying[0], 10))
    engine.add("in prefill", of_book(900, 10, start=200))
    engine.step()
    engine.step()
    assert not engine.abort("in prefill").token_ids
    engine.add("before its first step", of_book(40, 10, start=900))
    engine.abort("before its first step")
    decoding = engine.add("decoding", of_book(100, 200, start=400))
    waiting = engine.add("next to it", of_book(90, 60, start=600))
    engine.step_until(has_generated(decoding, 30))
    engine.abort("decoding")
    engine.step_until(has_generated(waiting, 40))
    engine.add("in a prefill of one step", of_book(100, 20, start=33))
    engine.abort("in a prefill of one step")


def one_id_again_and_again(engine: SteppedEngine) -> None:
    """In the very step after the request that had it is over."""
    engine.add("neighbour", of_book(50, 150, start=44))
    first = engine.add("id", of_book(100, 100))
    engine.step_until(has_generated(first, 20))
    engine.abort("id")
    # As long as the cache that the id had: as if it had grown by one token.
    again = engine.add("id", of_book(100 + len(first.token_ids), 40, start=500))
    engine.step_until(lambda: again.finish_reason is not None)
    third = engine.add("id", of_book(700, 40, start=90))
    engine.step_until(lambda: len(third.rows) == 1)
    engine.abort("id")
    fourth = engine.add("id", of_book(30, 40, start=800))
    engine.step_until(lambda: fourth.finish_reason is not None)


def long_prompt_later(engine: SteppedEngine) -> None:
    decoding = [engine.add(f"short {i}", of_book(40, 100, 300 * i)) for i in range(2)]
    engine.step_until(has_generated(decoding[0], 5))
    long = engine.add("long", of_book(900, 50, start=100))
    before = len(decoding[0].token_ids)
    engine.step_until(has_generated(long, 1))
    assert len(decoding[0].token_ids) > before + 3 * NUM_DRAFTS


def the_same_beginnings(engine: SteppedEngine) -> None:
    whole = book_tokens(700, start=250)
    for i, prompt in enumerate([whole, whole, whole[:512] + book_tokens(80)]):
        sampling = {"max_tokens": 40, "ignore_eos": True}
        engine.add(f"prompt {i}", Request(prompt, sampling))
        engine.finish()


def ids_and_embeddings(engine: SteppedEngine) -> None:
    """Rows of embeddings come after rows of ids, and beside them."""
    engine.add("over soon", of_book(90, 1, start=5))
    engine.add("ids", of_book(120, 80, start=60))
    engine.step()
    engine.step()
    engine.add("embeddings", of_book(150, 60, start=400, as_embeddings=True))
    engine.add("in chunks", of_book(300, 40, start=700, as_embeddings=True))


def at_random(engine: SteppedEngine, seed: int) -> None:
    """Requests of any length come and are aborted at any time; ids are used again."""
    numbers = random.Random(seed)
    num_left, names = 24, [f"id {i}" for i in range(7)]
    while num_left or engine.live:
        free = [name for name in names if name not in engine.live]
        if num_left and free and numbers.random() < 0.9:
            num_left -= 1
            num_prompt = numbers.choice((1, 90, 450, 450, 600))
            max_tokens = numbers.choice((1, 60, 150, 150))
            options = {"priority": numbers.randrange(3)}
            start = numbers.randrange(2000)
            name = numbers.choice(free)
            if engine.schedules_ahead:  # a step of the last one may be under way
                names[names.index(name)] = name = f"{name}, request {num_left}"
            engine.add(name, of_book(num_prompt, max_tokens, start, **options))
        if engine.live and numbers.random() < 0.02:
            engine.abort(numbers.choice(sorted(engine.live)))
        engine.step()


def conversations(engine: SteppedEngine) -> None:
    """Turns that follow each other, and what the drafter knew of them before."""

    def known_of(name: str, request: Request, times: int = 1) -> int:
        before = counted_metrics()["snapshot_tokens_total"]
        for each in range(times):
            engine.add(f"{name} {each}", request)
        engine.finish()
        return int(counted_metrics()["snapshot_tokens_total"] - before)

    engine.reset_prefix_cache()
    sampling = {"max_tokens": 20, "ignore_eos": True}
    prompt, contexts = book_tokens(200, start=700), [list[int]()]
    for turn in range(4):
        known = known_of(f"turn {turn}", Request(prompt, sampling))
        assert known >= len(contexts[-1]) - 3, (turn, known)
        assert known <= len(contexts[-1])
        contexts.append([*prompt, *engine.courses[-1].token_ids])
        prompt = [*contexts[-1], *book_tokens(30, start=100 * turn)]
    # An answer is asked for again, twice at once.
    again = contexts[3][:-20]
    known = known_of("again", Request(again, sampling), times=2)
    assert known >= 2 * (len(again) - 3)
    # The last answer but one is another one.
    edited = [*contexts[3][:-10], 5, 6, 7]
    assert known_of("edited", Request(edited, sampling)) >= len(edited) - 6
    # The first question is: what comes after it is of no use.
    edited = [*contexts[1][:100], 5, 6, 7, *contexts[4][100:]]
    assert known_of("begun anew", Request(edited, sampling)) <= 100
    for name, salt in (("of somebody else", "salt"), ("again theirs", "salt")):
        known = known_of(name, Request(contexts[4], sampling, salt=salt))
        assert (known > 0) == (name == "again theirs"), known
    engine.reset_prefix_cache()
    assert not known_of("after a reset", Request(contexts[4], sampling))


def instructions(engine: SteppedEngine, expected: list[int]) -> None:
    """Calls that begin alike for 300 tokens, and go on differently.

    Args:
        expected: tokens that the drafter knew of each.
    """
    engine.reset_prefix_cache()
    system, known = book_tokens(300, start=200), []
    for call in range(4):
        before = counted_metrics()["snapshot_tokens_total"]
        sampling = {"max_tokens": 6, "ignore_eos": True}
        task = [5 + call, *book_tokens(40, start=50 * call)]
        engine.add(f"call {call}", Request(system + task, sampling))
        engine.finish()
        known.append(int(counted_metrics()["snapshot_tokens_total"] - before))
    assert known == expected, known
