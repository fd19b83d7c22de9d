"""FlexDraft in vLLM's model runner V2, whose kernels run in Triton's interpreter."""

from collections.abc import Iterator

import pytest

from tests.support.engine_settings import COMMON, FEW_BLOCKS, draft
from tests.support.engines import FLEXDRAFT, EngineProcess, engine_process
from tests.support.runner_v2 import schedule_ahead
from tests.support.scripts import (
    aborts,
    all_at_once,
    check,
    low_priority_first,
    of_book,
    one_id_again_and_again,
)

pytestmark = pytest.mark.vllm

FLEX = draft(model=FLEXDRAFT, kv_budget=128, recent_window=64, local_tokens=32)


@pytest.fixture(scope="module")
def plain() -> Iterator[EngineProcess]:
    with engine_process(COMMON) as engine:
        yield engine


@pytest.fixture(scope="module")
def v1() -> Iterator[EngineProcess]:
    with engine_process(COMMON | FEW_BLOCKS | FLEX) as engine:
        yield engine


@pytest.fixture(scope="module")
def v2() -> Iterator[EngineProcess]:
    with engine_process(COMMON | FEW_BLOCKS | FLEX, schedule_ahead) as engine:
        yield engine


def test_both_runners_draft_the_same(v1, v2, plain):
    """Prompts within the budget and beyond it, whose prefill takes several steps."""
    requests = [of_book(n, 60, start=3 * n) for n in (60, 200, 500)]
    played = [engine.play(all_at_once, requests) for engine in (v1, v2)]
    for each in played:
        check(each, plain)
    first, second = ([c.gains for c in each.courses] for each in played)
    assert first == second
    assert max(max(gains) for gains in first) > 3


@pytest.mark.parametrize("script", [low_priority_first, aborts])
def test_requests_come_and_go(v2, plain, script):
    check(v2.play(script), plain)


@pytest.mark.parametrize("script", [low_priority_first, one_id_again_and_again])
def test_requests_come_and_go_in_v1(v1, plain, script):
    check(v1.play(script), plain)
