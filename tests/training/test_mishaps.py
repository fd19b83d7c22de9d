"""Runs that a full disk, bad weights or a user end before their time."""

import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

from tests.support.disks import small_files
from tests.support.training_runs import losses, train, write_inputs
from vllm_budgetdraft.drafter import weights
from vllm_budgetdraft.drafter.checkpoint import load_drafter


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("part", ["checkpoint-4", ""])
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(
    inputs, tmp_path, capsys, monkeypatch, part
):
    """Of a checkpoint as of the drafter in the end, by safetensors' own error."""
    folder = part or ".unfinished"

    def full(tensors, path, **kwargs):
        if not Path(path).parent.name.startswith(folder):
            return save_file(tensors, path, **kwargs)
        with pytest.raises(SafetensorError) as error, small_files(1024):
            save_file(tensors, path, **kwargs)
        raise error.value

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(SystemExit):
        train(inputs, tmp_path, steps=5)
    assert "no space left" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint-4").exists() or not part
    left = {each.name for each in tmp_path.iterdir()}
    assert left <= {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    monkeypatch.undo()
    train(inputs, tmp_path, "--resume_from_checkpoint", "true", steps=5)
    assert len(losses(tmp_path / "checkpoint-5")) == 5
    assert load_drafter(tmp_path, max_positions=8)


def test_a_run_of_which_nothing_fits_on_the_disk_ends_in_one_message(
    inputs, tmp_path, capsys
):
    """By a limit that the system keeps, whoever writes: here the first checkpoint."""
    train(inputs, tmp_path / "whole", steps=1)  # what is read is in the cache then
    with pytest.raises(SystemExit) as stop, small_files(16 * 1024):
        train(inputs, tmp_path / "full", "--save_steps", "1", steps=1)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "no space left on the disk" in said and "Traceback" not in said
    assert list((tmp_path / "full").glob("*.safetensors")) == []


def test_weights_that_are_not_finite_are_refused_before_a_step(
    inputs, tmp_path, capsys
):
    """Of the drafter to begin with, and of a checkpoint to go on from."""
    train(inputs, tmp_path / "run", steps=2)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "nan")
    for name in ("nan", "run/checkpoint-2"):
        path = tmp_path / name / "model.safetensors"
        weights = load_file(path)
        next(iter(weights.values())).view(-1)[0] = float("nan")
        save_file(weights, path, metadata={"format": "pt"})
    given = {
        "--drafter": tmp_path / "nan",
        "--resume_from_checkpoint": tmp_path / "run" / "checkpoint-2",
    }
    for option, folder in given.items():
        with pytest.raises(SystemExit) as stop:
            train(inputs, tmp_path / "run", option, str(folder), steps=3)
        assert stop.value.code == 2, option
        assert "has values that are not finite" in capsys.readouterr().err
        assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_an_interrupted_run_says_how_to_go_on(inputs, tmp_path, capsys, monkeypatch):
    def interrupted_at(step):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return whole(self, *args, **kwargs)

        whole = Trainer.training_step
        monkeypatch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(SystemExit) as stop:
            train(inputs, tmp_path / "run", steps=4)
        monkeypatch.undo()
        assert stop.value.code == 130
        return capsys.readouterr().err

    assert "holds no complete checkpoint: the same options begin anew" in (
        interrupted_at(0)
    )
    said = interrupted_at(3)
    assert f"{tmp_path / 'run' / 'checkpoint-2'} is complete: go on from it" in said
    assert "--resume_from_checkpoint true" in said
    train(inputs, tmp_path / "run", "--resume_from_checkpoint", "true", steps=4)
    assert load_drafter(tmp_path / "run", max_positions=8)
