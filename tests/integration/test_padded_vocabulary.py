"""vLLM with a target and a drafter that pad one vocabulary to different sizes.

Weights are random, so that the target samples ids that no token has as it does others.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import models
from tests.support.distributions import next_logits, p_value, sampling_engine
from tests.support.engines import Job
from tests.support.padded import FEWER, MORE, write_padded
from tests.support.processes import nothing
from tests.support.runner_v2 import schedule_ahead
from tests.support.tiny_pair import (
    FEW_SAMPLES,
    NUM_TOKENS,
    PROMPT,
    SIZES,
    distribution,
    engine_args,
    job,
)
from vllm_budgetdraft.comparison.engines import check_engine
from vllm_budgetdraft.diagnosis import check
from vllm_budgetdraft.evaluation.acceptance import greedy_continuation

pytestmark = pytest.mark.vllm

ROWS_DIFFER = pytest.mark.parametrize(
    ("prepare", "target_rows", "drafter_rows", "num_drawn"),
    [
        (nothing, MORE, FEWER, FEW_SAMPLES),
        pytest.param(nothing, FEWER, MORE, FEW_SAMPLES, marks=pytest.mark.slow),
        # In the interpreter sampling takes long.
        pytest.param(schedule_ahead, MORE, FEWER, 500, marks=pytest.mark.slow),
        (schedule_ahead, FEWER, MORE, 0),
    ],
    ids=["v1_fewer", "v1_more", "v2_fewer", "v2_more"],
)


@ROWS_DIFFER
def test_output_is_the_targets(
    prepare: Callable[[], None],
    target_rows: int,
    drafter_rows: int,
    num_drawn: int,
    tmp_path: Path,
) -> None:
    rows = {"target": target_rows, "drafter": drafter_rows}
    target, drafter = (
        write_padded(tmp_path / name, **SIZES | {"vocab_size": size})
        for name, size in rows.items()
    )
    model = models.read_model(target)
    prompts = [[*PROMPT, token, *PROMPT] for token in (2, 7, target_rows - 1)]
    expected = [greedy_continuation(model, prompt, 24) for prompt in prompts]
    if target_rows > drafter_rows:  # then it samples some that the drafter lacks
        assert max(map(max, expected)) >= drafter_rows
    with sampling_engine(engine_args(target, drafter), prepare) as engine:
        greedy = engine.sample(Job(prompts, {"temperature": 0.0, "max_tokens": 24}))
        assert greedy.token_ids == expected
        assert sum(greedy.accepted) > 0
        if num_drawn:
            drawn = engine.sample(job(num_drawn, temperature=1.0))
            logits = next_logits(model, PROMPT, NUM_TOKENS)
            assert p_value(drawn.token_ids, distribution(logits)) > 0.001
            assert drawn.accepted[1] > 0.01 * num_drawn


@pytest.mark.parametrize(("target_rows", "own"), [(MORE, FEWER), (FEWER, MORE)])
def test_it_is_said_once_at_start_and_by_check(target_rows, own, tmp_path, monkeypatch):
    from vllm_budgetdraft.vllm_integration.faults import logger

    said: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *of: said.append(text % of))
    target = write_padded(tmp_path / "target", vocab_size=target_rows)
    drafter = write_padded(tmp_path / "drafter", vocab_size=own)
    settings = {"model": str(drafter), "num_speculative_tokens": 4}
    config = check_engine(
        {
            "model": str(target),
            "max_num_seqs": 2,
            "speculative_config": {
                "method": "budgetdraft",
                "adaptive_draft_length": False,
                **settings,
            },
        }
    )
    note = (
        f"vocab_size={own} in the drafter, {target_rows} in the target, of equal "
        f"tokenizers: ids from {FEWER} on are never drafted"
    )
    assert said == [f"BudgetDraft vocabulary: {note}"]
    assert check._facts(config, str(target), str(drafter))["vocabulary"] == note
    assert len(said) == 1
