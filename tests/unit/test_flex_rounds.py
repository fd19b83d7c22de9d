"""When mask tokens go along with the target's pass, and what of it is timed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.mask_engine import SETTINGS, Engine, settings_of_engine
from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.proposer.step_costs import StepCosts

pytestmark = pytest.mark.vllm


def test_a_target_of_graphs_takes_no_masks_along(monkeypatch):
    from tests.support.fake_gpu import cpus_are_gpus
    from vllm_budgetdraft.vllm_integration import flex_rounds, speculative_config

    monkeypatch.setattr(flex_rounds, "put_beside", lambda *args: None)

    def rounds(mode: str, enforce_eager: bool, can_choose: bool = True) -> Any:
        config = settings_of_engine(enforce_eager)
        core = Engine(flex_decoding=mode).core
        return flex_rounds.rounds_for(
            core, config, None, lambda: None, can_choose=can_choose
        )

    with cpus_are_gpus():
        assert rounds("auto", enforce_eager=False) is None
        assert rounds("parallel", enforce_eager=True).mode == "parallel"
        target = SimpleNamespace(
            enforce_eager=False,
            hf_text_config=models.llama(),
            get_sliding_window=lambda: None,
        )
        config = SettledConfig(model="", **SETTINGS, flex_decoding="parallel")
        written = {"draft_tokens": 4, "sees_bonus": False}
        monkeypatch.setattr(
            speculative_config, "read_flexdraft_config", lambda folder: written
        )
        with pytest.raises(UnsupportedVllmError, match="use enforce_eager=True"):
            speculative_config._check_flexdraft(config, target, SimpleNamespace())
    assert rounds("auto", enforce_eager=False).mode == "sequential"
    assert rounds("auto", enforce_eager=False, can_choose=False) is None
    assert rounds("sequential", enforce_eager=True) is None


def test_a_step_is_timed_where_the_batch_stays_and_all_draft(monkeypatch):
    """vLLM's list of requests is one list, whatever is in it."""
    from vllm_budgetdraft.vllm_integration import flex_rounds

    monkeypatch.setattr(flex_rounds, "put_beside", lambda *args: None)
    monkeypatch.setattr(
        flex_rounds,
        "time_steps",
        lambda runner, core: StepCosts({1: 1.0}, {1: {1: 0.1}, 4: {1: 0.1}}, 4),
    )
    core = Engine(flex_decoding="auto").core
    config = settings_of_engine(True)
    rounds = flex_rounds.rounds_for(core, config, None, lambda: None, can_choose=True)
    rounds.time_steps(None)
    timed, ids = [], ["a"]
    monkeypatch.setattr(
        rounds._switch, "took", lambda mode, size, *args: timed.append(size)
    )
    for step in range(6):
        rounds.begin_step()
        if step == 2:
            ids.append("b")  # prefilled in this step
        if step == 4:
            continue  # nobody drafts
        rounds.take(torch.tensor([0]), 4)
        rounds.next(ids, {}, 4, are_undisturbed=True)
    assert timed == [1, 2]


def test_no_masks_go_along_with_what_nobody_drafts_after(monkeypatch):
    from vllm_budgetdraft.vllm_integration import flex_rounds

    monkeypatch.setattr(flex_rounds, "put_beside", lambda *args: None)
    core, passes = Engine(flex_decoding="parallel").core, []
    config = settings_of_engine(True)
    rounds = flex_rounds.rounds_for(
        core, config, None, lambda: passes.append(1), can_choose=False
    )
    rounds._begin(5)
    assert not passes
    rounds.begin_step()
    rounds.take(torch.tensor([0]), 4)
    rounds._begin(5)
    rounds._begin(512 // 6 + 1)  # more tokens than vLLM has measured
    assert len(passes) == 1
    rounds.begin_step()  # and nobody drafts
    rounds._begin(5)
    assert len(passes) == 1
