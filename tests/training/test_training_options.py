"""What the command line and its configs say, and what is refused."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support import models
from tests.support.training_runs import losses, run_options, train, write_inputs
from vllm_budgetdraft.training.__main__ import main
from vllm_budgetdraft.training.config_files import PRESETS, with_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_config_is_read_and_the_command_line_wins(inputs, tmp_path):
    config = tmp_path / "run.yaml"
    given = {"objective": "kl", "max_steps": 3, "budgets": [24, 28], "bf16": False}
    config.write_text(yaml.safe_dump(given))
    found = with_config(["--config", str(config), "--max_steps", "1"])
    assert found[-2:] == ["--max_steps", "1"]
    train(inputs, tmp_path / "run", "--config", str(config), steps=2)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["objective"] == "kl" and told["max_steps"] == 2


def test_a_config_is_named_in_one_word_or_two_and_may_hold_options_of_options(
    inputs, tmp_path
):
    config = tmp_path / "run.yaml"
    given = {
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
    }
    config.write_text(yaml.safe_dump(given))
    named = [f"--config={config}"], ["--config", str(config)]
    first, second = (with_config([*each, "--max_steps", "1"]) for each in named)
    assert first == second
    # After the command line's own constant schedule.
    own = run_options(inputs, tmp_path / "run", 1)
    at = own.index("--lr_scheduler_type")
    main([f"--config={config}", *own[:at], *own[at + 2 :]])
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["lr_scheduler_kwargs"] in ({"num_cycles": 2}, "{'num_cycles': 2}")


def test_windows_have_their_own_seed_be_it_0(inputs, tmp_path):
    def losses_of(*seeds: str) -> list[float]:
        folder = tmp_path / "-".join(seeds)
        # The same drafter and budget, whatever the seed of the run.
        same = ("--drafter", str(tmp_path / "same"), "--budgets", "24")
        train(inputs, folder, *same, "--budget_weights", "1", *seeds, steps=2)
        return losses(folder / "checkpoint-2")

    train(inputs, tmp_path / "same", steps=1)
    own = losses_of("--data_seed", "0", "--seed", "7")
    assert own == losses_of("--data_seed", "0", "--seed", "0")
    assert own != losses_of("--seed", "7")


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS.glob("*.yaml")])
def test_presets_hold_known_options(preset, inputs, tmp_path, capsys):
    """They get as far as the window, which is longer than this target's positions."""
    own = ("--target", str(inputs / "target"), "--output_dir", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["--config", preset, *own, "--use_cpu"])
    assert "make windows of" in capsys.readouterr().err


def test_the_paper_is_a_preset():
    found = with_config(["--config", "paper"])
    place = found.index("--budgets")
    assert found[place + 1 : place + 5] == ["256", "512", "1024", "2048"]
    assert "ce" in found and "16128" in found


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["no", "texts"], "nothing to train on"),
        (["--max_steps", "-1"], "say after how many steps"),
        (["--prefix_tokens", "4000"], "beyond the target's"),
        (["--budgets", "4", "32"], "raise it or lower sink_tokens"),
        (["--budgets", "32"], "one weight for each budget"),
        (["--texts", "leaflets.jsonl"], "fewer than the 64"),
        (["--texts", "no_such.jsonl"], "names no file"),
        (["--drafter", "other"], "has no tokenizer.json to compare"),
        (["--target", "./nowhere"], "'./nowhere' cannot be loaded"),
        (["--target_layers", "7"], "choose some of them"),
        (["--resume_from_checkpoint", "true"], "no complete checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "not written to its end"),
        (["--config", "nowhere.yaml"], "a preset (paper)"),
        (
            ["--eval_strategy", "steps", "--eval_steps", "1"],
            "give held-out conversations or texts",
        ),
        (
            ["--position_weights", "dpace", "--draft_tokens", "7"],
            "no multiple of draft_tokens=7",
        ),
        (
            ["--position_weights", "decay", "--loss_chunk_tokens", "12"],
            "loss_chunk_tokens=12",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_refused(inputs, tmp_path, capsys, more, message):
    if "other" in more:
        models.write_model(tmp_path / "other", models.llama(vocab_size=77))
    files = {"leaflets.jsonl": inputs, "no_such.jsonl": inputs, "other": tmp_path}
    more = [str(files[each] / each) if each in files else each for each in more]
    given = run_options(inputs, tmp_path / "run", 1)
    if more == ["no", "texts"]:
        more = []
        del given[2:4]
    with pytest.raises(SystemExit) as stop:
        main([*given, *more])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
