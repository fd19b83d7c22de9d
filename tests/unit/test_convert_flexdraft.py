"""FlexDraft folders in the layout that its authors release."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support import models
from tests.support.flex_twin import random_drafter, random_target
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.errors import UnsupportedDrafterError
from vllm_budgetdraft.flexdraft.checkpoint import (
    fingerprint,
    load_flexdraft,
    read_flexdraft_config,
    save_flexdraft,
)
from vllm_budgetdraft.flexdraft.convert import convert

LAYERS, RANK, BLOCK = 2, 6, 9


@pytest.fixture(scope="module")
def target():
    return random_target(models.qwen3)


def calibration(target) -> nn.Sequential:
    """As they define it."""
    config = target.config
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(2 * config.hidden_size, RANK),
        nn.SiLU(),
        nn.Linear(RANK, config.vocab_size),
    )


def release(
    folder: Path,
    target,
    section: str = "dflash_config",
    calibrates: bool = True,
    num_target_layers: int | None = None,
    extra: dict[str, Tensor] | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """Writes a folder of theirs, and returns what it holds."""
    config, settings = target.config, {"anchor_bias_rank": 256}
    depth = config.num_hidden_layers
    settings |= {
        "target_layer_ids": list(range(depth - LAYERS, depth)),
        **changes,
    }
    folder.mkdir()
    document = {
        "architectures": ["FlexDraftBiasModel"],
        "num_hidden_layers": LAYERS,
        "num_target_layers": num_target_layers or depth,
        "block_size": BLOCK,
        section: settings,
    }
    (folder / "config.json").write_text(json.dumps(document))
    torch.manual_seed(1)
    state = {"mask_embedding": torch.randn(config.hidden_size), **(extra or {})}
    state["norm.weight"] = torch.ones(config.hidden_size)
    for layer in range(LAYERS):
        theirs = target.model.layers[depth - LAYERS + layer].state_dict()
        for name, weight in theirs.items():
            state[f"layers.{layer}.{name}"] = torch.randn_like(weight)
    if calibrates:
        for name, weight in calibration(target).state_dict().items():
            state[f"anchor_bias_mlp.{name}"] = weight
    half = len(state) // 2  # in two files, as large ones are
    for number, some in enumerate((list(state)[:half], list(state)[half:])):
        save_file(
            {name: state[name].contiguous() for name in some},
            folder / f"model-0000{number + 1}-of-00002.safetensors",
        )
    return state


@pytest.mark.parametrize("section", ["dflash_config", "flexdraft_config"])
def test_what_was_tuned_is_taken_over(target, tmp_path, section):
    state = release(tmp_path / "theirs", target, section)
    convert(tmp_path / "theirs", target, "small", tmp_path / "ours")
    assert read_flexdraft_config(tmp_path / "ours")["draft_tokens"] == BLOCK - 1
    drafter = load_flexdraft(tmp_path / "ours", target, max_positions=64)
    assert not drafter.sees_bonus and not drafter.chains
    assert torch.equal(drafter.mask_embedding, state["mask_embedding"])
    x = torch.randn(5, target.config.hidden_size)
    for layer, own in enumerate(drafter.layers):
        attention = target.model.layers[-LAYERS + layer].self_attn
        named = f"layers.{layer}.self_attn."
        weights = {
            name.removeprefix(named): weight
            for name, weight in state.items()
            if name.startswith(named)
        }
        original = attention.state_dict()
        original = {name: each.clone() for name, each in original.items()}
        attention.load_state_dict(weights)
        projected = own.project(x)
        heads = target.config.num_attention_heads
        q = attention.q_norm(attention.q_proj(x).unflatten(-1, (heads, -1)))
        torch.testing.assert_close(projected[:, :heads], q)
        torch.testing.assert_close(
            own.output(projected[:, :heads]), attention.o_proj(q.flatten(-2))
        )
        attention.load_state_dict(original)
    hidden, bonus = torch.randn(2, 4, target.config.hidden_size)
    expected = calibration(target)(torch.cat([bonus, hidden], -1))
    found = drafter.correction(drafter.features(hidden, bonus))
    torch.testing.assert_close(found, expected)


def test_one_without_calibration_is_taken_over_too(target, tmp_path):
    release(tmp_path / "theirs", target, calibrates=False)
    convert(tmp_path / "theirs", target, "small", tmp_path / "ours")
    drafter = load_flexdraft(tmp_path / "ours", target, max_positions=64)
    assert drafter.calibration_rank == 0
    hidden = torch.randn(3, target.config.hidden_size)
    assert not drafter.correction(drafter.features(hidden, hidden)).any()


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        (
            {"target_layer_ids": [0, 2]},
            ["the layers [0, 2]", "the last 2 are expected"],
        ),
        ({"num_target_layers": 99}, ["of a target of 99"]),
        (
            {"extra": {"fc.weight": torch.ones(3)}},
            ["['fc.weight'] are missing, unknown"],
        ),
        (
            {"extra": {"layers.0.self_attn.gate.weight": torch.ones(3)}},
            ["['layers.0.self_attn.gate.weight']"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(target, tmp_path, changes, mentions):
    release(tmp_path / "theirs", target, **changes)
    with pytest.raises(UnsupportedDrafterError) as refusal:
        convert(tmp_path / "theirs", target, "small", tmp_path / "ours")
    for part in mentions:
        assert part in str(refusal.value)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"num_hidden_layers": 2}'])
def test_a_folder_of_something_else_is_refused(target, tmp_path, text):
    (tmp_path / "theirs").mkdir()
    if text:
        (tmp_path / "theirs" / "config.json").write_text(text)
    with pytest.raises(UnsupportedDrafterError, match="as its authors release"):
        convert(tmp_path / "theirs", target, "small", tmp_path / "ours")


@pytest.mark.parametrize("section", [None, {}, {"anchor_bias_rank": 6}, [1]])
def test_a_folder_that_names_no_layers_is_refused(target, tmp_path, section):
    """For which their code would take others than the last."""
    release(tmp_path / "theirs", target)
    file = tmp_path / "theirs" / "config.json"
    document = json.loads(file.read_text()) | {"dflash_config": section}
    file.write_text(json.dumps(document))
    with pytest.raises(UnsupportedDrafterError, match="has no 'target_layer_ids'"):
        convert(tmp_path / "theirs", target, "small", tmp_path / "ours")


def test_a_shallow_target_is_refused(tmp_path):
    shallow = random_target(models.qwen3, num_hidden_layers=1)
    release(tmp_path / "theirs", random_target(models.qwen3))
    with pytest.raises(UnsupportedDrafterError, match="give the target"):
        convert(tmp_path / "theirs", shallow, "small", tmp_path / "ours")


def test_weights_cut_short_are_refused(target, tmp_path):
    release(tmp_path / "theirs", target)
    file = next((tmp_path / "theirs").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UnsupportedDrafterError, match="cannot be read"):
        convert(tmp_path / "theirs", target, "small", tmp_path / "ours")


def test_weights_that_are_not_there_are_missed(target, tmp_path):
    release(tmp_path / "theirs", target)
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UnsupportedDrafterError, match="download its weights"):
        convert(tmp_path / "theirs", target, "small", tmp_path / "ours")


def test_the_command(target, tmp_path, capsys):
    release(tmp_path / "theirs", target)
    target.save_pretrained(tmp_path / "target")
    command = (
        "convert-flexdraft --target {0}/target --released {0}/theirs --output {0}/o"
    )
    main(command.format(tmp_path).split())
    assert "Written to" in capsys.readouterr().out
    assert load_flexdraft(tmp_path / "o", target, max_positions=8)


def test_biases_that_are_not_stored_are_none(target, tmp_path):
    """As in folders that were written before there were any."""
    drafter = random_drafter(target)
    settings = {"target": "", "fingerprint": fingerprint(target), "draft_tokens": 4}
    save_flexdraft(drafter, tmp_path, settings, dtype=torch.float32)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("calibration_in_bias", "calibration_out_bias"):
        assert state.pop(name).any()
    save_file(state, tmp_path / "model.safetensors")
    drafter = load_flexdraft(tmp_path, target, max_positions=64)
    assert not drafter.calibration_in_bias.any()
    assert not drafter.calibration_out_bias.any()
