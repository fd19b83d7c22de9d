"""Real engines: those that start together, and the logits of a race."""

import multiprocessing
import re
import shutil
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.books import write_target
from vllm_budgetdraft.comparison import engine_process
from vllm_budgetdraft.comparison.engine_process import EngineProcess
from vllm_budgetdraft.comparison.engines import running
from vllm_budgetdraft.comparison.methods import PLAIN, Method
from vllm_budgetdraft.comparison.races import races_of
from vllm_budgetdraft.comparison.room import memory_at_hand
from vllm_budgetdraft.errors import BudgetDraftError

pytestmark = pytest.mark.vllm

#: A token whose logit is never below another's, and its twin, which always ties.
TOKEN, TWIN = 10, 20


@pytest.fixture
def engine_args(tmp_path) -> dict:
    folder = write_target(tmp_path / "target", head_dim=32)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    head[TWIN] = head[TOKEN]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return {
        "model": str(folder),
        "dtype": "bfloat16",
        "max_model_len": 128,
        "max_num_seqs": 1,
        "enforce_eager": True,
    }


def test_a_tie_is_told_from_a_fault_by_the_targets_own_logits(engine_args) -> None:
    sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    prompt = [3, 1, 4, 1, 5]
    said: list[str] = []
    with running([Method(PLAIN)], engine_args, memory_at_hand(), said.append) as found:
        plain = found[PLAIN]
        tokens = plain.generate(prompt, sampling).token_ids
        dtype = plain.describe()["dtype"]
        ranked = plain.logits(prompt + tokens[:5], [TOKEN, TWIN])
        worst = next(t for t in range(30, 40) if t != tokens[5])
        outputs = {PLAIN: tokens, "other": [*tokens[:5], worst, *tokens[6:]]}
        races = races_of(plain, dtype, prompt, outputs)
        again = plain.generate(prompt, sampling).token_ids
    assert dtype == "bfloat16" and said[0].startswith("vllm is ready after")
    assert again == tokens
    logits = dict(ranked)
    assert logits[TOKEN] == logits[TWIN]
    assert ranked[0][0] == tokens[5]
    assert races["other"]["position"] == 5
    best, lower = races["other"]["logits"][0], dict(races["other"]["logits"])[worst]
    assert best == ranked[0] and races["other"]["gap"] == best[1] - lower > 0


def test_an_engine_that_fails_is_named_and_leaves_no_process(engine_args) -> None:
    methods = [Method(PLAIN), Method("ngram", engine_args={"max_model_len": 10**6})]
    memory = memory_at_hand()
    with (
        pytest.raises(BudgetDraftError, match="ngram did not start") as failed,
        running(methods, engine_args, memory, lambda line: None),
    ):
        pass
    assert not multiprocessing.active_children()
    (log,) = re.findall(r"its log is (\S+),", str(failed.value))
    assert "max_model_len" in Path(log).read_text()
    shutil.rmtree(Path(log).parent)


def test_a_dead_engine_has_the_same_last_words_whenever_it_is_asked(
    engine_args, tmp_path
) -> None:
    dead = engine_args | {"max_model_len": 10**6}
    with closing(EngineProcess(dead, tmp_path / "engine.log")) as engine:
        for ask in (engine.wait_until_ready, engine.describe, engine.describe):
            with pytest.raises(RuntimeError, match="(?s)stopped.*max_model_len"):
                ask()
        assert not multiprocessing.active_children()


def is_ready_and_waits(pipe: Connection, args: dict, log: str, variables: dict) -> None:
    """An engine, as far as this process sees."""
    Path(log).write_text("is ready\n")
    pipe.send(None)
    pipe.recv()


def test_an_engine_that_is_killed_while_idle_is_said_to_have_stopped(
    monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(engine_process, "_serve", is_ready_and_waits)
    with closing(EngineProcess({}, tmp_path / "engine.log")) as engine:
        engine.wait_until_ready()
        engine._process.kill()
        engine._process.join()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="(?s)stopped.*is ready"):
                engine.describe()
