"""Embeddings that are the target's: kept in training, left out, and joined again."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import models
from tests.support.books import write_target
from tests.support.training_runs import losses, train, write_inputs
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.drafter.checkpoint import EMBEDDING, LM_HEAD, load_drafter
from vllm_budgetdraft.errors import UnsupportedDrafterError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a target whose output matrix is not its embeddings."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_drafter_as_wide_as_its_target_keeps_the_targets_embeddings(
    inputs, tmp_path, is_tied
):
    write_target(tmp_path / "target", tie_word_embeddings=is_tied)
    options = ("--target", str(tmp_path / "target"))
    train(inputs, tmp_path, *options, steps=2)
    target = models.read_model(tmp_path / "target")
    found = weights(tmp_path / "checkpoint-2")
    assert torch.equal(found[EMBEDDING], target.get_input_embeddings().weight)
    assert (LM_HEAD in found) != is_tied
    head = found[EMBEDDING if is_tied else LM_HEAD]
    assert torch.equal(head, target.get_output_embeddings().weight)
    first, second = losses(tmp_path / "checkpoint-2")
    assert second < first


def test_embeddings_learn_where_that_is_asked_for_or_the_width_is_another(
    inputs, tmp_path
):
    target = weights(inputs / "target")[EMBEDDING]
    train(inputs, tmp_path / "asked", "--train_embeddings", "true", steps=2)
    found = weights(tmp_path / "asked" / "checkpoint-2")[EMBEDDING]
    # They began as the target's, and have learnt since.
    assert 0 < (found - target).abs().max() < 0.1
    train(inputs, tmp_path / "narrow", "--hidden_size", "24", steps=3)
    first, last = (
        weights(tmp_path / "narrow" / f"checkpoint-{step}")[EMBEDDING]
        for step in (2, 3)
    )
    assert first.shape[1] == 24 and not torch.equal(first, last)


def test_a_drafter_that_goes_on_keeps_its_own_embeddings(inputs, tmp_path):
    train(inputs, tmp_path / "first", "--train_embeddings", "true", steps=1)
    own = weights(tmp_path / "first")[EMBEDDING].float()
    train(inputs, tmp_path, "--drafter", str(tmp_path / "first"), steps=1)
    assert torch.equal(weights(tmp_path / "checkpoint-1")[EMBEDDING], own)


@pytest.fixture(scope="module")
def layers(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    train(inputs, folder, "--layers_alone", "true", steps=2)
    return folder


def test_layers_alone_become_the_drafter_again(inputs, layers, tmp_path):
    train(inputs, tmp_path / "whole", steps=2)
    assert not (layers / "model.safetensors").exists()
    alone = load_file(layers / "layers.safetensors")
    assert not {EMBEDDING, LM_HEAD} & set(alone)
    joined = tmp_path / "joined"
    main(
        f"join --target {inputs / 'target'} --layers {layers} --output {joined}".split()
    )
    expected = weights(tmp_path / "whole")
    found = weights(joined)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    # For vLLM's own draft_model, too.
    logits = models.read_model(joined)(models.random_tokens(20)[None]).logits
    assert logits.isfinite().all()
    assert (joined / "tokenizer.json").is_file()


def test_training_goes_on_from_layers_alone(inputs, layers, tmp_path):
    train(inputs, tmp_path, "--drafter", str(layers), steps=1)
    assert losses(tmp_path / "checkpoint-1")[0] < losses(layers / "checkpoint-2")[0]


def test_serving_says_how_layers_alone_become_a_drafter(layers):
    with pytest.raises(UnsupportedDrafterError, match="budgetdraft join --target"):
        load_drafter(layers, max_positions=8)


def remove_layers(folder: Path, inputs: Path) -> None:
    shutil.rmtree(folder)


def make_narrow(folder: Path, inputs: Path) -> None:
    write_target(inputs / "target", hidden_size=24)


def make_large(folder: Path, inputs: Path) -> None:
    write_target(inputs / "target", vocab_size=models.VOCAB_SIZE + 1)


def remove_target(folder: Path, inputs: Path) -> None:
    shutil.rmtree(inputs / "target")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_layers, "layers.safetensors is not there"),
        (make_narrow, r"have 97 rows of 24, and .* 97 rows of 48; give the target"),
        (make_large, "have 98 rows of 48"),
        (remove_target, "cannot be loaded"),
    ],
)
def test_what_does_not_go_together_is_not_joined(
    spoil, message, inputs, layers, tmp_path, capsys
):
    folder, target = tmp_path / "layers", tmp_path / "inputs" / "target"
    shutil.copytree(layers, folder)
    shutil.copytree(inputs / "target", target)
    spoil(folder, tmp_path / "inputs")
    command = f"join --target {target} --layers {folder} --output {tmp_path / 'out'}"
    with pytest.raises(SystemExit):
        main(command.split())
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_embeddings_of_another_width_cannot_be_kept(inputs, tmp_path, capsys):
    options = ("--hidden_size", "24", "--train_embeddings", "false")
    with pytest.raises(SystemExit):
        train(inputs, tmp_path, *options, steps=1)
    assert "48 wide, in a new drafter with hidden_size=24" in capsys.readouterr().err


def test_layers_alone_need_embeddings_that_are_the_targets(inputs, tmp_path, capsys):
    train(inputs, tmp_path / "own", "--train_embeddings", "true", steps=1)
    for more in (
        ("--train_embeddings", "true"),
        ("--hidden_size", "24"),
        ("--drafter", str(tmp_path / "own")),
    ):
        with pytest.raises(SystemExit):
            train(inputs, tmp_path / "x", *more, "--layers_alone", "true", steps=1)
        assert "this drafter's are its own" in capsys.readouterr().err
    flexdraft = ("--drafter_type", "flexdraft", "--draft_tokens", "4")
    with pytest.raises(SystemExit):
        train(inputs, tmp_path / "x", *flexdraft, "--layers_alone", "true", steps=1)
    assert "a flexdraft has none" in capsys.readouterr().err
