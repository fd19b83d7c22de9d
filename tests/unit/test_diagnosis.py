"""``budgetdraft env`` and the parts of ``check`` that need no engine."""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from tests.support.drafting import build_proposer
from tests.support.models import VOCAB_SIZE
from tests.support.stub_engine import StubEngine
from vllm_budgetdraft import __version__
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.comparison import engines, room
from vllm_budgetdraft.comparison.engine_process import EngineProcess
from vllm_budgetdraft.comparison.methods import PLAIN, Method
from vllm_budgetdraft.comparison.races import race
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.diagnosis import check, env
from vllm_budgetdraft.diagnosis.memory import describe
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.vllm_integration.compatibility import NEWEST

ROOT = Path(__file__).parents[2]
TARGET = str(ROOT / "models" / "books-9m")
DRAFTER = str(ROOT / "models" / "books-9m-drafter")


def test_env_says_what_is_installed_and_why(capsys, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("BUDGETDRAFT_CHECK_INVARIANTS", "1")
    main(["env", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["vllm-budgetdraft"].startswith(__version__)
    assert found["vllm"].endswith("supported")
    assert found["torch"] == torch.__version__
    assert found["plugin"] == "is loaded by vLLM"
    assert "BUDGETDRAFT_CHECK_INVARIANTS=1" in found["variables"]
    if not torch.cuda.is_available():
        assert found["attention backend"] == "torch, for there is no GPU"
    assert found["model runner"][:3] in ("V1,", "V2,", "V2;")
    main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == list(found)


def test_env_says_what_a_drafter_would_take(capsys):
    main(
        [
            *("env", "--drafter", DRAFTER, "--max-num-seqs", "8"),
            *("--max-model-len", "2048", "--speculative-config", '{"kv_budget": 256}'),
        ]
    )
    # 256 + 256 + 9 tokens are 33 pages of 16; 1 KiB each, and a page to spare.
    expected = "draft cache 4.1 MiB (8 requests x 528 tokens, 528.0 KiB each;"
    if not torch.cuda.is_available():  # where it is in bfloat16
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("plugins", "said"),
    [("", "left out by VLLM_PLUGINS=; add"), ("a,budgetdraft", "is loaded by vLLM")],
)
def test_env_notices_that_plugins_are_chosen(plugins, said, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert said in env._plugin()


@pytest.mark.parametrize(
    ("version", "asked", "has_triton", "said"),
    [
        ("0.32.0", None, True, "V2; V1 for draft_confidence_threshold "),
        ("0.33.0", None, False, "V1, for vLLM finds no Triton that runs here"),
        ("0.33.0", True, False, "V2, for VLLM_USE_V2_MODEL_RUNNER=1"),
        ("0.33.0", False, True, "V1, for VLLM_USE_V2_MODEL_RUNNER=0"),
        ("0.27.1", None, True, "V1, for V2 is taken from vLLM 0.32 on"),
        ("0.27.1", False, True, "V1, for VLLM_USE_V2_MODEL_RUNNER=0"),
        ("0.27.1", True, True, "V2, for VLLM_USE_V2_MODEL_RUNNER=1, but drafts are "),
        (None, None, True, "not installed"),
    ],
)
def test_env_says_which_model_runner_vllm_takes(
    version, asked, has_triton, said, monkeypatch
):
    from vllm import envs, triton_utils

    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", asked, raising=False)
    monkeypatch.setattr(triton_utils, "HAS_TRITON", has_triton)
    assert env._model_runner(version).startswith(said)


def test_env_says_what_keeps_vllm_from_being_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", None)
    assert env._model_runner("0.32.0").startswith(
        "unknown, for vLLM cannot be imported"
    )


def test_env_names_what_is_wrong_with_vllm():
    major, minor = NEWEST
    assert "is outside what" in env._vllm(f"{major}.{minor + 1}.0", is_named=True)
    assert "python -m vllm" in env._vllm(f"{major}.{minor}.0", is_named=False)
    assert env._vllm(None, is_named=False) == "not installed"


@pytest.mark.parametrize("vocab_size", [None, 30_000])
def test_the_bill_is_that_of_the_tensors(drafter_folder, vocab_size):
    settings = {"num_speculative_tokens": 4, "kv_budget": 40, "draft_dtype": "float32"}
    text = describe(
        BudgetDraftConfig(model=str(drafter_folder), **settings),
        max_model_len=2048,
        max_num_seqs=3,
        target_dtype=torch.bfloat16,
        device_type="cpu",
        vocab_size=vocab_size,
    )
    core = build_proposer(
        drafter_folder,
        num_slots=3,
        max_model_len=2048,
        kv_budget=40,
        vocab_size=vocab_size,
    )
    weights = sum(p.nbytes for p in core.drafter.parameters()) / 2**20
    cache = core.cache.pool.num_bytes / 2**20
    assert text.startswith(
        f"drafter weights {weights:.1f} MiB, draft cache {cache:.1f}"
    )
    assert f"scratch {core.scratch_bytes / 2**20:.1f} MiB" in text


def test_vocabularies_of_one_size_may_still_differ(tmp_path, drafter_folder):
    assert check._vocabulary(TARGET, DRAFTER, 4096).endswith("of equal tokenizers")
    assert "has no tokenizer.json" in check._vocabulary(
        TARGET, str(drafter_folder), VOCAB_SIZE
    )
    for file in Path(DRAFTER).glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    assert "4 entries of the tokenizers differ" in check._vocabulary(
        TARGET, str(tmp_path), 4096
    )


def test_outputs_that_differ_are_said_to():
    row = {
        "speedup": 1.5,
        "decode_speedup": 2.0,
        "num_runs": 4,
        "acceptance_length": None,
        "output_identical": 0.5,
        "output_ties": 1,
    }
    verdict = check._verdict(row, [], 1024, 128)
    assert verdict["outputs"].startswith("50% equal")
    assert verdict["outputs"].endswith("no tie explains the others")
    assert verdict["acceptance"].startswith("1.00 tokens")
    assert verdict["speed-up"].startswith("1.50x of a request, 2.00x after the first")
    target = SimpleNamespace(logits=lambda prompt, tokens: [(5, 3.0), (6, 2.0)])
    wide = race(target, "bfloat16", [], [5], [6])
    target = SimpleNamespace(logits=lambda prompt, tokens: [(5, 3.0), (6, 3.0)])
    close = race(target, "bfloat16", [], [5], [6])
    verdict = check._verdict(row, [close, wide, close], 1024, 128)
    assert "1 of 3 others part at a tie within rounding" in verdict["outputs"]
    assert "a gap of 1 is NOT a tie within rounding (0.0156)" in verdict["outputs"]
    assert "float32" in verdict["outputs"]


@pytest.mark.parametrize(("free_bytes", "is_together"), [(2**40, True), (2**31, False)])
def test_engines_without_room_for_both_are_compared_all_the_same(
    free_bytes, is_together, monkeypatch, capsys
):
    outputs = {"budgetdraft": [0, 1, 2, 9, 9, 9, 9, 9]}
    StubEngine.install(monkeypatch, dtype="bfloat16", outputs=outputs)
    memory = room.Memory("cpu", free_bytes, 2**41)
    monkeypatch.setattr(room, "memory_at_hand", lambda: memory)
    args = SimpleNamespace(target=TARGET, new_tokens=8, seconds=0.0)
    speculative_config = {"method": "budgetdraft", "model": DRAFTER}
    row, rounds = check._measure(args, {"model": TARGET}, speculative_config, 50)
    races = [race for each in rounds for race in each["races"].values()]
    assert (row["kind"], row["num_runs"]) == ("budgetdraft", 1)
    assert (row["output_identical"], row["output_ties"]) == (0, 1)
    assert [race["position"] for race in races] == [3]
    said = capsys.readouterr().out
    assert ("one engine after the other" in said) != is_together
    assert [engine.config["method"] for engine in StubEngine.made] == (
        ["vllm", "budgetdraft"] if is_together else ["budgetdraft", "vllm"]
    )
    # No longer than its prompts need, whatever the target could.
    assert {engine.engine_args["max_model_len"] for engine in StubEngine.made} == {58}


def test_what_a_user_says_of_the_length_is_measured(monkeypatch):
    StubEngine.install(monkeypatch)
    args = SimpleNamespace(target=TARGET, new_tokens=8, seconds=0.0)
    given = {"model": TARGET, "max_model_len": 500}
    check._measure(args, given, {"method": "budgetdraft", "model": DRAFTER}, 50)
    assert {engine.engine_args["max_model_len"] for engine in StubEngine.made} == {500}


def measured(seconds: float) -> tuple[dict, list]:
    args = SimpleNamespace(target=TARGET, new_tokens=8, seconds=seconds)
    settings = {"method": "budgetdraft", "model": DRAFTER}
    return check._measure(args, {"model": TARGET}, settings, 50)


def answers_of(
    monkeypatch: pytest.MonkeyPatch, count: int, then: Callable[[], None]
) -> None:
    """Engines that answer so many whole requests, and then do something else."""
    generate = StubEngine.generate

    def limited(self, prompt, sampling):
        if len(StubEngine.asked) == count:
            then()
        return generate(self, prompt, sampling)

    StubEngine.install(monkeypatch, generate=limited)


def test_the_seconds_to_measure_for_bound_all_measuring(monkeypatch, capsys):
    """Whatever an engine is doing when they are over; prompts that were done count."""
    sleep = partial(time.sleep, 30)
    begun = time.monotonic()
    answers_of(monkeypatch, 3, sleep)
    row, _ = measured(1.0)
    assert row["num_runs"] == 1
    said = capsys.readouterr().out
    assert "prompt 1: vllm 2.0 s, budgetdraft 2.0 s" in said
    assert "vllm, budgetdraft: loading and compiling" in said
    answers_of(monkeypatch, 0, sleep)
    message = "no prompt of 50 tokens was done in --seconds 1; give more"
    with pytest.raises(ConfigurationError, match=message):
        measured(1.0)
    assert time.monotonic() - begun < 20
    assert all(engine.is_closed for engine in StubEngine.made)


def test_an_interrupted_check_gives_the_numbers_so_far(monkeypatch, capsys):
    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    answers_of(monkeypatch, 5, interrupt)
    row, _ = measured(30.0)
    assert row["num_runs"] == 2
    assert "interrupted   what follows is of 2 prompts" in capsys.readouterr().out
    answers_of(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt, match="nothing was measured yet"):
        measured(30.0)


def test_engines_that_start_slowly_say_how_far_they_are(monkeypatch, tmp_path):
    class Slow(StubEngine):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.connection, other = Pipe()
            threading.Timer(0.5, other.close).start()

    Slow.install(monkeypatch)
    monkeypatch.setattr(engines, "SILENT_SECONDS", 0.1)
    told: list[str] = []
    memory = room.Memory("cpu", 2**40, 2**41)
    with engines.running([Method(PLAIN)], {"model": TARGET}, memory, told.append):
        pass
    assert told[0] == "vllm is starting, 0 s so far: Loading weights"
    assert told[-1].startswith("vllm is ready after")


@pytest.mark.parametrize("answers", [True, False])
def test_an_engine_at_work_on_what_nobody_waits_for_is_ended_at_once(answers):
    """Its answer may take minutes; one that is idle ends by itself."""
    done = []
    engine = object.__new__(EngineProcess)
    engine._is_ready, engine._is_busy = True, False
    engine._process = SimpleNamespace(
        kill=lambda: done.append("killed"),
        join=lambda timeout=None: done.append("joined"),
        is_alive=lambda: False,
    )

    def recv() -> None:
        if not answers:
            raise KeyboardInterrupt

    engine._pipe = SimpleNamespace(
        send=lambda _: None, recv=recv, close=lambda: done.append("closed")
    )
    with nullcontext() if answers else pytest.raises(KeyboardInterrupt):
        engine.describe()
    engine.close()
    assert done == ["closed", *(() if answers else ("killed",)), "joined"]
