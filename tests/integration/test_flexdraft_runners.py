"""FlexDraft in both of vLLM's model runners; V2's kernels run in the interpreter."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration import test_lifecycle as lifecycle
from tests.integration.test_flexdraft import samples_have_the_targets_distribution
from tests.support.engine_settings import COMMON, FEW_BLOCKS, NUM_DRAFTS, draft
from tests.support.engines import (
    FLEXDRAFT,
    EngineProcess,
    Request,
    SteppedEngine,
    engine_process,
    nothing,
)
from tests.support.flex_twin import blind
from tests.support.runner_v2 import interpret_kernels, schedule_ahead
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


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings by which the target drafts while it verifies."""
    drafter = blind(tmp_path_factory.mktemp("blind") / "drafter")
    config = FLEX["speculative_config"]
    return {
        "speculative_config": {
            **config,
            "model": drafter,
            "flex_decoding": "parallel",
        }
    }


@pytest.fixture(scope="module")
def parallel_v1(parallel) -> Iterator[EngineProcess]:
    with engine_process(COMMON | FEW_BLOCKS | parallel) as engine:
        yield engine


@pytest.fixture(scope="module")
def parallel_v2(parallel) -> Iterator[EngineProcess]:
    with engine_process(COMMON | FEW_BLOCKS | parallel, schedule_ahead) as engine:
        yield engine


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_both_runners_draft_the_same(mode, plain, request):
    """Prompts within the budget and beyond it, whose prefill takes several steps."""
    names = ("v1", "v2") if mode == "sequential" else ("parallel_v1", "parallel_v2")
    requests = [of_book(n, 40, start=3 * n) for n in (60, 200, 500)]
    engines = [request.getfixturevalue(name) for name in names]
    played = [engine.play(all_at_once, requests) for engine in engines]
    for each in played:
        check(each, plain)
    first, second = ([c.gains for c in each.courses] for each in played)
    assert first == second
    assert max(max(gains) for gains in first) > 2


def modes_take_turns(engine: SteppedEngine, requests: list[Request]) -> None:
    rounds, were_rounds = engine._drafter._rounds, []
    take = rounds.take

    def noted(*args: Any) -> Any:
        hidden = take(*args)
        were_rounds.append(hidden is not None)
        return hidden

    rounds.take = noted
    all_at_once(engine, requests)
    engine.finish()
    assert rounds._switch is not None
    assert 3 <= sum(were_rounds) < len(were_rounds)


def test_an_engine_tries_both_modes_and_its_output_is_plain_vllms(parallel, plain):
    config = parallel["speculative_config"] | {"flex_decoding": "auto"}
    with engine_process(COMMON | {"speculative_config": config}) as engine:
        requests = [of_book(n, 60, start=3 * n) for n in (60, 300)]
        check(engine.play(modes_take_turns, requests), plain)


def test_both_runners_verify_what_the_drafter_is_confident_of(plain):
    """In V2 where it does not schedule ahead."""
    config = FLEX["speculative_config"] | {"draft_confidence_threshold": 0.2}
    settings = COMMON | FEW_BLOCKS | {"speculative_config": config}
    requests = [of_book(n, 16, start=3 * n) for n in (60, 200)]
    played = []
    for prepare in (nothing, interpret_kernels):
        with engine_process(settings, prepare) as engine:
            played.append(engine.play(all_at_once, requests))
            check(played[-1], plain)
    first, second = ([c.gains for c in each.courses] for each in played)
    assert first == second
    assert played[0].drafted == played[1].drafted
    num_steps = sum(map(len, first))
    assert 0 < played[0].drafted < 0.8 * num_steps * NUM_DRAFTS


@pytest.mark.parametrize("script", [low_priority_first, aborts, one_id_again_and_again])
@pytest.mark.parametrize("name", ["v1", "parallel_v1"])
def test_requests_come_and_go(name, script, plain, request):
    check(request.getfixturevalue(name).play(script), plain)


@pytest.mark.parametrize(
    "script", [low_priority_first, pytest.param(aborts, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["v2", "parallel_v2"])
def test_they_do_so_in_v2(name, script, plain, request):
    check(request.getfixturevalue(name).play(script), plain)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "drafting",
    [
        "parallel_v1",
        pytest.param("v1", marks=SLOW),
        pytest.param("v2", marks=SLOW),
        pytest.param("parallel_v2", marks=SLOW),
    ],
)
def test_random_lives(drafting, plain, request):
    lifecycle.test_random_lives(drafting, plain, request)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_samples_of_v2_have_the_targets_distribution(mode, tmp_path):
    """Of few: V2's sampling kernels take long in the interpreter."""
    samples_have_the_targets_distribution(
        mode, tmp_path, num_samples=2000, prepare=schedule_ahead
    )
