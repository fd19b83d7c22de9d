"""What is read before each choice, by hand; ``test_views`` holds both sides to it."""

import pytest

from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.eviction.reading import ReadingPlan


def pieces(num_tokens: int, budget: int, native: int = 512, **settings) -> list[tuple]:
    view = ViewSettings(**{"draft_prefill": "streaming", **settings})
    plan = ReadingPlan.of(
        view,
        make_policy(view),
        native_tokens=native,
        num_tokens=num_tokens,
        budget=budget,
    )
    return [(each.start, each.stop) for each in plan.pieces(num_tokens)]


RELATIVE = {"position_mode": "cache_relative"}
WINDOW = {"eviction_policy": "sink_window", "sink_tokens": 8}


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        ((250, 64), {"draft_prefill": "full"}, [(0, 250)]),
        ((250, 64), {"eviction_policy": "keep_all"}, [(0, 250)]),
        ((0, 64), {}, []),
        ((250, 64), {"draft_prefill_chunk": 100}, [(0, 100), (100, 200), (200, 250)]),
        ((200, 64), {"draft_prefill_chunk": 100}, [(0, 100), (100, 200)]),
        # The native range holds 128 tokens, or the budget and 64 more.
        (
            (180, 64, 128),
            {"draft_prefill_chunk": 100, **RELATIVE},
            [(0, 100), (100, 164), (164, 180)],
        ),
        ((220, 64, 128), RELATIVE, [(0, 128), (128, 192), (192, 220)]),
        ((500, 505, 512), RELATIVE, [(0, 500)]),
        ((40, 64, 128), {**RELATIVE, **WINDOW}, [(0, 40)]),
        ((250, 64, 128), {**RELATIVE, **WINDOW}, [(0, 8), (194, 250)]),
        ((150, 64, 128), {"draft_prefill_chunk": 100}, [(0, 100), (100, 150)]),
        # Sinks, and the last 56 of 250: nothing between is read.
        ((250, 64), WINDOW, [(0, 8), (194, 250)]),
        (
            (250, 64),
            {"draft_prefill_chunk": 30, **WINDOW},
            [(0, 8), (194, 224), (224, 250)],
        ),
        (
            (250, 64),
            {"draft_prefill_chunk": 5, **WINDOW},
            [(0, 5), (5, 8), *((i, min(i + 5, 250)) for i in range(194, 250, 5))],
        ),
    ],
)
def test_pieces(arguments, settings, expected):
    assert pieces(*arguments, **settings) == expected


@pytest.mark.parametrize("first", [6, 9, 30])
@pytest.mark.parametrize("skipped", [range(0), range(10, 37)])
def test_choices_do_not_depend_on_what_is_read_at_once(skipped, first):
    plan, end = ReadingPlan(skipped, first, 6), 90
    choices = [piece.stop for piece in plan.pieces(end)]
    for position in range(end):
        if position not in skipped:
            choice = next(each for each in choices if each > position)
            assert min(plan.next_choice(position), end) == choice
