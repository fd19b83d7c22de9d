"""Whole runs, from the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import models
from tests.support.books import write_target
from tests.support.training_runs import (
    history,
    losses,
    run_options,
    train,
    write_inputs,
)
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.training.views import View, continuation_hidden


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of 5 steps, a checkpoint every other."""
    output = tmp_path_factory.mktemp("trained")
    train(inputs, output, steps=5)
    return output


def test_a_short_run_lowers_the_loss(inputs, tmp_path):
    train(inputs, tmp_path, "--objective", "ce", "--train_embeddings", "true", steps=5)
    found = losses(tmp_path / "checkpoint-5")
    assert len(found) == 5
    assert found[-1] < found[0] - 0.2


def test_the_log_tells_of_every_view(trained):
    views = {
        key
        for entry in history(trained / "checkpoint-5")
        for key in entry
        if key.startswith(("losses_", "agreements_"))
    }
    assert views == {
        f"{metric}_{view}"
        for metric in ("losses", "agreements")
        for view in ("full", "budget_24", "budget_32")
    }


def test_a_trained_folder_loads_here_and_in_transformers_alike(trained, inputs):
    drafter = load_drafter(trained, max_positions=128)
    tokens = models.random_tokens(60)[None]
    (hidden,) = continuation_hidden(drafter, tokens, [View([], [], 0)])
    theirs = models.read_model(trained)(tokens).logits
    assert (drafter.logits(hidden) - theirs).abs().max() < 1e-4
    assert drafter.config.architectures == ["LlamaForCausalLM"]
    assert drafter.config.budgetdraft["budgets"] == [24, 32]
    assert drafter.config.budgetdraft["local_tokens"] == 16
    for name in ("tokenizer.json", "tokenizer_config.json"):
        expected = (inputs / "target" / name).read_bytes()
        assert (trained / name).read_bytes() == expected


@pytest.mark.parametrize("folder", ["", "checkpoint-2", "checkpoint-5"])
def test_a_run_and_every_checkpoint_say_how_to_repeat_it(trained, folder):
    arguments = json.loads((trained / folder / "run.json").read_text())
    assert arguments["budgets"] == [24, 32] and arguments["learning_rate"] == 0.02
    command = (trained / folder / "train_command.txt").read_text()
    assert "vllm_budgetdraft.training" in command and "--budgets 24 32" in command


def test_the_card_tells_of_data_views_and_objective(trained):
    card = (trained / "README.md").read_text()
    for part in ("books.jsonl", "24, 32 tokens", "`kl`", "5 steps of 8", "40 tokens"):
        assert part in card, part
    assert "Not measured" in card


def same_weights(first: Path, second: Path) -> None:
    expected = load_file(second / "model.safetensors")
    found = load_file(first / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("which", ["checkpoint-2", "true"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    trained, inputs, tmp_path, which
):
    """To the bit; what was not written to its end is not gone on from."""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(trained / name, tmp_path / name)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    resume = str(tmp_path / which) if which != "true" else which
    train(inputs, tmp_path, "--resume_from_checkpoint", resume, steps=5)
    assert losses(tmp_path / "checkpoint-5") == losses(trained / "checkpoint-5")
    same_weights(tmp_path / "checkpoint-5", trained / "checkpoint-5")
    same_weights(tmp_path, trained)


def test_training_goes_on_from_a_drafter_that_was_trained_before(
    trained, inputs, tmp_path
):
    train(inputs, tmp_path, "--drafter", str(trained), steps=1)
    assert losses(tmp_path / "checkpoint-1")[0] < losses(trained / "checkpoint-5")[0]


def test_a_drafter_can_begin_as_layers_of_the_target(inputs, tmp_path):
    models.write_model(tmp_path / "deep", models.llama(num_hidden_layers=3), seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(inputs / "target" / name, tmp_path / "deep")
    slices = ("--target", str(tmp_path / "deep"), "--target_layers", "2", "0")
    train(inputs, tmp_path, *slices, "--learning_rate", "0", steps=1)
    found = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    target = load_file(tmp_path / "deep" / "model.safetensors")
    for ours, theirs in (("layers.0.", "layers.2."), ("layers.1.", "layers.0.")):
        names = [name for name in found if ours in name]
        assert len(names) == 9
        for name in names:
            assert torch.equal(found[name], target[name.replace(ours, theirs)].float())
    assert torch.equal(
        found["model.embed_tokens.weight"], target["model.embed_tokens.weight"]
    )


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint-1" / "model.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
        ("--gradient_checkpointing", "true"),
        ("--loss_chunk_tokens", "0"),
        ("--loss_chunk_tokens", "40"),
    ],
    ids=["accumulation", "checkpointing", "whole_logits", "small_chunks"],
)
def test_what_saves_memory_changes_no_step(inputs, tmp_path, more):
    always = ("--optim", "sgd", "--budgets", "24", "--budget_weights", "1")
    for name, options in (("plain", ()), ("saving", more)):
        train(inputs, tmp_path / name, *always, *options, steps=1)
    plain, saving = (final_weights(tmp_path / name) for name in ("plain", "saving"))
    for name, weight in saving.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        ("--objective", "lk_hybrid", "--position_weights", "dpace"),
        ("--objective", "lk_alpha", "--position_weights", "decay"),
        ("--objective", "kl", "--views_per_step", "2"),
        ("--objective", "tv", "--sparse_weight", "0"),
        ("--position_mode", "cache_relative", "--draft_prefill", "streaming"),
        ("--prefix_gradient", "true", "--draft_prefill_chunk", "16"),
        ("--bf16", "true"),
    ],
    ids=lambda more: "_".join(more),
)
def test_every_kind_of_run_runs_and_serving_is_told(inputs, tmp_path, more):
    train(inputs, tmp_path, *more, steps=2)
    (entry, *_) = history(tmp_path / "checkpoint-2")
    assert entry["loss"] > 0
    told = load_drafter(tmp_path, max_positions=64).config.budgetdraft
    pairs = dict(zip(more[::2], more[1::2], strict=True))
    assert told["position_mode"] == pairs.get("--position_mode", "absolute")
    if "--views_per_step" in pairs:
        assert {"losses_budget_24", "losses_budget_32"} <= entry.keys()
    if "--sparse_weight" in pairs:
        assert not any("budget" in key for key in entry)


@pytest.mark.parametrize(("mode", "native"), [("absolute", 64), ("cache_relative", 56)])
def test_a_drafter_is_made_for_the_positions_it_was_trained_on(
    inputs, tmp_path, mode, native
):
    """Windows are of 64 tokens; relative to the cache, positions stay within it."""
    vocab_size = load_drafter(inputs / "target", max_positions=1).config.vocab_size
    config = models.llama(vocab_size=vocab_size, max_position_embeddings=56)
    own = models.write_model(tmp_path / "own", config)
    more = ("--drafter", str(own), "--position_mode", mode)
    streams = ("--draft_prefill", "streaming")
    train(inputs, tmp_path / "run", *more, *streams, steps=1)
    config = load_drafter(tmp_path / "run", max_positions=1).config
    assert config.max_position_embeddings == native


@pytest.mark.parametrize("padding", [-1, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_a_drafter_padded_otherwise_gets_the_targets_vocabulary(
    padding, tied, inputs, tmp_path
):
    """It may lack a row that no token has, and it may have more of them."""
    target = write_target(tmp_path / "target", vocab_size=models.VOCAB_SIZE + 1)
    size = models.VOCAB_SIZE + 1 + padding
    own = write_target(tmp_path / "own", vocab_size=size, tie_word_embeddings=tied)
    pair = ("--target", str(target), "--drafter", str(own))
    train(inputs, tmp_path / "run", *pair, "--objective", "lk_hybrid", steps=4)
    found = losses(tmp_path / "run" / "checkpoint-4")
    assert found[-1] < found[0]
    trained = models.read_model(tmp_path / "run")
    assert trained.config.vocab_size == models.VOCAB_SIZE + 1
    assert trained.config.tie_word_embeddings == tied
    for matrix in (trained.get_input_embeddings(), trained.get_output_embeddings()):
        assert len(matrix.weight) == models.VOCAB_SIZE + 1
    train(
        *(inputs, tmp_path / "run", *pair, "--resume_from_checkpoint", "true"), steps=5
    )
    assert len(losses(tmp_path / "run" / "checkpoint-5")) == 5


def test_a_second_run_on_the_same_windows_need_not_ask_the_target(
    inputs, tmp_path, monkeypatch
):
    cache = ("--objective", "kl", "--teacher_cache", str(tmp_path / "cache"))
    train(inputs, tmp_path / "first", *cache, steps=2)
    monkeypatch.setattr(
        "vllm_budgetdraft.training.model.last_hidden", None
    )  # must not be called
    train(inputs, tmp_path / "second", *cache, steps=2)
    expected = losses(tmp_path / "first" / "checkpoint-2")
    assert losses(tmp_path / "second" / "checkpoint-2") == pytest.approx(
        expected, rel=0.01
    )


def test_two_processes_train_as_one_does(inputs, tmp_path):
    """With torchrun: the mean of the gradients, and the windows of one step."""
    together = run_options(inputs, tmp_path / "two", 2)
    together[together.index("--per_device_train_batch_size") + 1] = "4"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [sys.executable, *command, "-m", "vllm_budgetdraft.training", *together],
        check=True,
        env=environment,
        timeout=300,
    )
    train(inputs, tmp_path / "one", steps=2)
    expected = load_file(tmp_path / "one" / "checkpoint-2" / "model.safetensors")
    found = load_file(tmp_path / "two" / "checkpoint-2" / "model.safetensors")
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-4)


def test_the_best_drafter_of_a_run_is_kept(inputs, tmp_path):
    evaluates = f"""
        --eval_strategy steps --eval_steps 2 --eval_texts {inputs / "books.jsonl"}
        --eval_contexts 40 60 --eval_budgets 24 32 --eval_temperatures 0 1
        --eval_prompts 2 --eval_new_tokens 12 --eval_draft_tokens 3
    """.split()
    train(inputs, tmp_path, *evaluates, steps=6)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    measured = {
        entry["step"]: entry["eval_acceptance_length"]
        for entry in state["log_history"]
        if "eval_acceptance_length" in entry
    }
    assert measured.keys() == {2, 4, 6}
    assert all(1 <= length <= 4 for length in measured.values())
    best = max(measured, key=measured.get)
    assert state["best_global_step"] == best
    kept = load_file(tmp_path / "model.safetensors")
    weights = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    for name, weight in kept.items():
        assert torch.equal(weight, weights[name].bfloat16()), name
    card = (tmp_path / "README.md").read_text()
    assert f"step {best}" in card and "| 1 | 60 tokens of a text |" in card
    assert not (tmp_path / "being_evaluated").exists()


def test_held_out_texts_alone_are_measured_for_the_card(inputs, tmp_path):
    measures = f"""
        --eval_texts {inputs / "books.jsonl"} --eval_contexts 40 --eval_budgets 24
        --eval_prompts 2 --eval_new_tokens 12 --eval_draft_tokens 3
    """.split()
    train(inputs, tmp_path, *measures, steps=3)
    card = (tmp_path / "README.md").read_text()
    assert (
        "step 3" in card
        and "| 0 | 40 tokens of a text |" in card
        and "Not measured" not in card
    )


def test_held_out_conversations_are_measured_in_the_template(inputs, tmp_path):
    rows = [{"turns": ["Who is there?"]}, {"question": "What is it?"}, {"turns": []}]
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    measures = f"""
        --eval_conversations {held_out} --eval_budgets 24 32 --eval_temperatures 0 1
        --eval_prompts 2 --eval_new_tokens 12 --eval_draft_tokens 3
    """.split()
    output = tmp_path / "out"
    train(inputs, output, *measures, "--chat_template", template, steps=2)
    card = (output / "README.md").read_text()
    assert "| prompt | budget 24 | budget 32 |" in card
    assert "| 0 | chat | " in card and "| 1 | chat | " in card
    assert "tokens of a text" not in card


def test_budgets_that_hold_every_prefix_train_no_sparse_view(
    inputs, tmp_path, monkeypatch
):
    """And the card does not say that they did."""
    told = []
    monkeypatch.setattr(
        "vllm_budgetdraft.training.__main__.logger.warning",
        lambda text, *values: told.append(text % values),
    )
    train(inputs, tmp_path / "none", "--budgets", "40", "64", steps=1)
    assert "no sparse view" in told[0]
    assert "sparse" not in (tmp_path / "none" / "README.md").read_text()
    told.clear()
    train(inputs, tmp_path / "some", steps=1)
    assert not told
    assert "0.5 of sparse views" in (tmp_path / "some" / "README.md").read_text()


def test_a_step_that_is_not_finite_is_left_out_and_counted(
    inputs, tmp_path, monkeypatch
):
    from vllm_budgetdraft.training import base

    original, calls = base.multi_view_loss, []

    def sometimes_nan(*args):
        calls.append(args)
        loss, means = original(*args)
        return loss * (float("nan") if len(calls) == 2 else 1.0), means

    monkeypatch.setattr(base, "multi_view_loss", sometimes_nan)
    train(inputs, tmp_path, "--save_steps", "1", steps=3)
    counts = [e["skipped_steps"] for e in history(tmp_path / "checkpoint-3")[:3]]
    assert counts == [0, 1, 1]
    same_weights(tmp_path / "checkpoint-2", tmp_path / "checkpoint-1")
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    train(inputs, tmp_path, "--resume_from_checkpoint", "true", steps=4)
    assert history(tmp_path / "checkpoint-4")[-1]["skipped_steps"] == 1
