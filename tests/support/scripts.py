"""Scripts of requests that engines play, and what must come of them."""

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


def has_generated(course: Course, num_tokens: int):
    return lambda: len(course.token_ids) >= num_tokens


def gains_after(course: Course, num_tokens: int) -> list[int]:
    """What the steps brought once there were ``num_tokens``."""
    pairs = zip(course.lengths, course.gains, strict=True)
    return [gain for length, gain in pairs if length > num_tokens]
