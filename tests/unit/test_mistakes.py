"""What users get wrong on a command line: status 2, one message, no traceback."""

import json
from pathlib import Path

import pytest

from tests.support.engines import DRAFTER, TARGET
from tests.support.training_runs import run_options, write_inputs
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.comparison import engine_process, engines, evaluate, measure
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.files import LOCK

TEXTS = "--texts books.jsonl"
GENERATE = f"generate --target {TARGET} {TEXTS}"
EVALUATE = f"evaluate --target {TARGET} --drafter {DRAFTER}"
CHECK = f"check {TARGET} {DRAFTER}"
NO_FOLDER = "cannot be written to ("
NO_OBJECT = "is no JSON object"
FROM_1 = "is no whole number from 1 on"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what mistaken commands name."""
    folder = write_inputs(tmp_path_factory.mktemp("mistakes"))
    (folder / "file").write_text("no folder")
    (folder / "latin").write_bytes(b"{caf\xe9}: \xff")
    (folder / "broken.yaml").write_text("a: [1,\nb: }")
    (folder / "chats.jsonl").write_text(json.dumps({"turns": ["Why?"]}) + "\n")
    for name, text in {"torn": '{"target": ', "foreign": "[1]"}.items():
        (folder / name).mkdir()
        for file in ("generation.json", "run.json", "results.json"):
            (folder / name / file).write_text(text)
    (folder / "another").mkdir()
    (folder / "another" / "results.json").write_text('{"results": []}')
    return folder


@pytest.fixture(autouse=True)
def no_engines(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(measure, "measure", None)
    monkeypatch.setattr(engines, "check_engine", None)
    monkeypatch.setattr(measure, "prepare_environment", lambda: None)
    monkeypatch.setattr(engine_process, "preload", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *((f"{each} --output file", NO_FOLDER) for each in (GENERATE, EVALUATE)),
        *((f"{each} --output file/in", NO_FOLDER) for each in (GENERATE, EVALUATE)),
        *((f"{each} --output torn", NO_OBJECT) for each in (GENERATE, EVALUATE)),
        *((f"{each} --output foreign", NO_OBJECT) for each in (GENERATE, EVALUATE)),
        *((f"{each} --engine-args 5", NO_OBJECT) for each in (GENERATE, EVALUATE)),
        *((f"{each} --engine-args {{", NO_OBJECT) for each in (GENERATE, EVALUATE)),
        *((f"{each} --new-tokens 0", FROM_1) for each in (GENERATE, EVALUATE, CHECK)),
        (f"{GENERATE} --output new --prompts 0", "is not TOKENS:COUNT"),
        (f"{GENERATE} --output new --prompts 8:0", "asks for none"),
        (f"{GENERATE} --output new --prompts-per-file 0", FROM_1),
        (f"{GENERATE} --output new --prompts-per-file -1", FROM_1),
        (f"{GENERATE} --output new --temperature -1", "no number from 0 on"),
        (f"{GENERATE} --output a1 --target /nope", "'/nope' cannot be loaded"),
        (
            f"generate --target {TARGET} --conversations chats.jsonl --output a2 "
            "--chat-template latin",
            "latin cannot be read ('utf-8' codec",
        ),
        (f"{EVALUATE} --prompts 0", FROM_1),
        (f"{EVALUATE} --kv-budgets -5", FROM_1),
        (f"{EVALUATE} --num-speculative-tokens 0", FROM_1),
        (f"{EVALUATE} --engines-at-once 0", FROM_1),
        (f"{EVALUATE} --concurrency 0", FROM_1),
        (f"{EVALUATE} --new-tokens 8 --output a3 --target /nope", "cannot be read"),
        (f"{CHECK} --engine-args 5", NO_OBJECT),
        (f"{CHECK} --speculative-config [1]", NO_OBJECT),
        (f"{CHECK} --seconds nan", "no number from 0 on"),
        (f"{CHECK} --seconds inf", "no number from 0 on"),
        (f"env --drafter {DRAFTER} --speculative-config [1]", NO_OBJECT),
        ("report torn --output page.html", NO_OBJECT),
        ("report foreign --output page.html", NO_OBJECT),
        ("report another --output page.html", "has no ['notes', 'provenance'"),
        ("pad-target --target /nope --output new", "'/nope' cannot be loaded"),
        (f"pad-target --target {TARGET} --output file", NO_FOLDER),
        (f"demo --target /nope --drafter {DRAFTER}", "'/nope' cannot be loaded"),
        ("demo --new-tokens 0", FROM_1),
        ("train --config broken.yaml", "is no YAML (while parsing"),
        ("train --config latin", "latin cannot be read ('utf-8' codec"),
        ("TRAIN --output_dir file", NO_FOLDER),
        ("TRAIN --output_dir file/in", NO_FOLDER),
        ("TRAIN --target /nope", "'/nope' cannot be loaded"),
        ("TRAIN --eviction_policy nope", "eviction_policy='nope' is unknown"),
        ("TRAIN --continuations latin", "has no known suffix"),
        ("TRAIN --bf16 true --fp16 true", "the options cannot be taken ("),
    ],
)
def test_a_mistake_is_told_in_one_message(command, message, folder, tmp_path, capsys):
    words = command.split()
    if words[0] == "TRAIN":
        words[:1] = ["train", *run_options(folder, tmp_path / "run", 1)]
    if words[0] in ("generate", "evaluate") and "--output" not in words:
        words += ["--output", "new"]
    assert message in refusal(words, capsys)
    assert not (folder / "new").exists(), "nothing was written there"


@pytest.mark.parametrize(
    "name", ["target", "drafter", "texts", "continuations", "output_dir", "config"]
)
def test_the_home_folder_is_understood_by_training(
    name, folder, tmp_path, monkeypatch, capsys
):
    """Wherever a path stands, be it in a config, and with ``=`` as without."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / "run.yaml"
    given = "~/run.yaml" if name == "config" else str(config)
    options = {} if name == "config" else {name: "~/file"}
    config.write_text(json.dumps(options | {"max_steps": 1}))
    words = ["train", *run_options(folder, tmp_path / "out", 1)]
    if name in ("target", "texts", "output_dir"):
        place = words.index(f"--{name}")
        del words[place : place + 2]
    (tmp_path / "file").touch()
    if name == "config":
        words += ["--texts", "nowhere.jsonl"]
    said = refusal([*words, f"--config={given}"], capsys)
    assert (str(tmp_path / "file") if name != "config" else "nowhere.jsonl") in said
    assert "~" not in said


@pytest.mark.parametrize(
    "command",
    [
        f"generate --target ~/file {TEXTS} --output new",
        f"generate --target {TARGET} {TEXTS} --output ~/file",
        f"generate --target {TARGET} --texts ~/file --output new",
        f"{EVALUATE} --output=~/file",
        f"{EVALUATE} --output new --data books=~/file",
        "env --drafter ~/file",
        "report ~/file --output page.html",
        f"join --target {TARGET} --layers ~/file --output new",
        f"convert-flexdraft --target {TARGET} --released ~/file --output new",
        "fetch smollm2 --folder ~/file",
    ],
)
def test_the_home_folder_is_understood(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal(command.split(), capsys)


def test_settings_are_checked_before_an_engine_starts(tmp_path, monkeypatch, capsys):
    """And before they are kept, so that the folder takes the right ones then."""

    def check(engine_args):
        config = engine_args.get("speculative_config", {})
        if config.get("kv_budget") == 3:
            raise ConfigurationError("kv_budget=3 is below what fits")

    monkeypatch.setattr(engines, "check_engine", check)
    words = [*EVALUATE.split(), "--kv-budgets", "3", "--context-tokens", "64"]
    said = refusal([*words, "--output", str(tmp_path / "out")], capsys)
    assert "kv_budget=3 is below" in said
    assert not (tmp_path / "out").exists()


def test_an_evaluation_without_a_folder_gets_a_dated_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def stop(args, output):
        assert (output / LOCK).is_file()
        (output / "rounds.jsonl").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_evaluate", stop)
    with pytest.raises(SystemExit) as ended:
        main(EVALUATE.split())
    assert ended.value.code == 130
    (made,) = tmp_path.iterdir()
    assert made.name.startswith("evaluation-20")
    said = capsys.readouterr().err
    assert f"Results go to {made.name}." in said
    assert f"interrupted; what was measured is in {made.name}" in said
    assert f"--output {made.name} goes on there" in said
    assert [each.name for each in made.iterdir()] == ["rounds.jsonl"]
