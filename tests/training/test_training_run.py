"""``python -m vllm_budgetdraft.training`` from its arguments to its folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import models
from tests.support.books import write_books, write_target
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.training.__main__ import main
from vllm_budgetdraft.training.views import PrefixCache, continuation_hidden


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_target(folder / "target")
    write_books(folder / "books.jsonl")
    return folder


def train(inputs: Path, output: Path, *more: str, steps: int) -> None:
    arguments = f"""
        --target {inputs / "target"} --books {inputs / "*.jsonl"}
        --hidden_size 48 --intermediate_size 64 --num_hidden_layers 2
        --num_attention_heads 6 --num_key_value_heads 2
        --prefix_tokens 40 --continuation_tokens 24
        --budgets 24 32 --budget_weights 0.5 0.5 --local_tokens 16
        --per_device_train_batch_size 8 --learning_rate 0.02 --max_steps {steps}
        --lr_scheduler_type constant --logging_steps 1 --save_steps 2
        --report_to none --disable_tqdm true --use_cpu --output_dir {output}
    """
    main([*arguments.split(), *more])


def losses(checkpoint: Path) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in history["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of 5 steps, a checkpoint every other."""
    output = tmp_path_factory.mktemp("trained")
    train(inputs, output, steps=5)
    return output


def test_a_short_run_lowers_the_loss(trained):
    history = losses(trained / "checkpoint-5")
    assert len(history) == 5
    assert history[-1] < history[0] - 0.2


def test_a_trained_folder_loads_here_and_in_transformers_alike(trained, inputs):
    drafter = load_drafter(trained, max_positions=128)
    tokens = models.random_tokens(60)[None]
    hidden = continuation_hidden(drafter, tokens, 0, PrefixCache([], [], [], []))
    theirs = models.read_model(trained)(tokens).logits
    assert (drafter.logits(hidden) - theirs).abs().max() < 1e-4
    assert drafter.config.architectures == ["LlamaForCausalLM"]
    assert drafter.config.budgetdraft["budgets"] == [24, 32]
    assert drafter.config.budgetdraft["local_tokens"] == 16
    for name in ("tokenizer.json", "tokenizer_config.json"):
        expected = (inputs / "target" / name).read_bytes()
        assert (trained / name).read_bytes() == expected


def test_a_run_leaves_what_is_needed_to_repeat_it(trained):
    arguments = json.loads((trained / "run.json").read_text())
    assert arguments["budgets"] == [24, 32] and arguments["learning_rate"] == 0.02
    assert "vllm_budgetdraft.training" in (trained / "train_command.txt").read_text()


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trained, inputs, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    resume = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))
    train(inputs, tmp_path, *resume, steps=5)
    assert losses(tmp_path / "checkpoint-5") == pytest.approx(
        losses(trained / "checkpoint-5"), rel=1e-4
    )
    expected = load_file(trained / "checkpoint-5" / "model.safetensors")
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        # The final folder is rounded to bfloat16, checkpoints are not.
        torch.testing.assert_close(
            weight, expected[name].bfloat16(), rtol=1e-2, atol=1e-4
        )


def test_training_goes_on_from_a_drafter_that_was_trained_before(
    trained, inputs, tmp_path
):
    train(inputs, tmp_path, "--drafter", str(trained), steps=1)
    assert losses(tmp_path / "checkpoint-1")[0] < losses(trained / "checkpoint-5")[0]
