"""Folders whose weights are codes, or not the drafter's: read right, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import models
from tests.test_import_boundaries import source_files
from vllm_budgetdraft.drafter.checkpoint import check_weights, load_drafter
from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.drafter.weights import write_weights
from vllm_budgetdraft.errors import UnsupportedDrafterError

BLOCK = (16, 32)
PROJECTION = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return models.write_model(tmp_path / "drafter", models.llama(), seed=1)


def change(folder: Path, method: str | None = None, **config: Any) -> dict[str, Tensor]:
    """A folder's weights, to be changed; and its config with a quantisation."""
    if method:
        path = folder / "config.json"
        quantised = {"quantization_config": {"quant_method": method, **config}}
        path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    return load_file(folder / "model.safetensors")


def write(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def encode(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes, and what one unit of them stands for: the largest of each group."""
    most = 127.0 if "int8" in kind else 448.0
    code = torch.int8 if "int8" in kind else torch.float8_e4m3fn
    wide = weight.float()
    if "tensor" in kind:
        scale = wide.abs().max().reshape(1) / most
        codes = wide / scale
    elif "row" in kind:
        scale = wide.abs().amax(1, keepdim=True) / most
        codes = wide / scale
    else:
        rows, columns = (-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True))
        scale = torch.zeros(rows, columns)
        codes = torch.zeros_like(wide)
        for i in range(rows):
            for j in range(columns):
                block = (
                    slice(i * BLOCK[0], (i + 1) * BLOCK[0]),
                    slice(j * BLOCK[1], (j + 1) * BLOCK[1]),
                )
                scale[i, j] = wide[block].abs().max() / most
                codes[block] = wide[block] / scale[i, j]
    codes = codes.round() if code == torch.int8 else codes
    return codes.to(code), scale


def refusal(folder: Path) -> str:
    """The same before and while loading."""
    with pytest.raises(UnsupportedDrafterError) as before:
        check_weights(folder, read_drafter_config(folder))
    with pytest.raises(UnsupportedDrafterError) as loading:
        load_drafter(folder, max_positions=8)
    assert str(before.value) == str(loading.value)
    return str(before.value)


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("int8 by tensor", "_scale"),
        ("int8 by row", "_scale"),
        ("fp8 by tensor", "_scale"),
        ("fp8 by row", "_scale"),
        ("fp8 by block", "_scale_inv"),
    ],
)
def test_codes_with_scales_are_multiplied_out(folder, kind, ending):
    before = load_drafter(folder, max_positions=64)
    weights = change(folder, "compressed-tensors", weight_block_size=BLOCK)
    for name, weight in list(weights.items()):
        if "proj" in name:
            weights[name], weights[name + ending] = encode(weight, kind)
            weights[name.replace("weight", "input_scale")] = torch.ones(1)
    write(folder, weights)
    check_weights(folder, read_drafter_config(folder))
    after = load_drafter(folder, max_positions=64)
    tolerance = 0.01 if "int8" in kind else 0.07
    for (name, found), expected in zip(
        after.named_parameters(), before.parameters(), strict=True
    ):
        assert found.dtype == torch.float32
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < tolerance, name
        assert bool(error) == ("qkv" in name or "_weight" in name), name


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("awq", ["qweight", "qzeros", "scales"]),
        ("gptq", ["qweight", "qzeros", "scales", "g_idx"]),
        ("compressed-tensors", ["weight_packed", "weight_scale", "weight_shape"]),
    ],
)
def test_other_codes_are_refused_by_their_method(folder, method, names):
    weights = change(folder, method)
    for name in [each for each in weights if "proj" in each]:
        del weights[name]
        for each in names:
            weights[name.replace("weight", each)] = torch.zeros(4, 4)
    write(folder, weights)
    message = refusal(folder)
    assert f"quantised by {method!r}" in message and names[0] in message


def test_codes_without_a_scale_are_refused(folder):
    weights = change(folder)
    weights[PROJECTION] = weights[PROJECTION].to(torch.int8)
    write(folder, weights)
    message = refusal(folder)
    assert f"{PROJECTION} is of type I8" in message and "with no scale" in message


@pytest.mark.parametrize("shape", [(3,), (2, 2), (4, 4, 1)])
def test_scales_of_another_kind_are_refused(folder, shape):
    weights = change(folder, "fp8")
    codes, _ = encode(weights[PROJECTION], "fp8 by tensor")
    weights |= {PROJECTION: codes, f"{PROJECTION}_scale": torch.ones(shape)}
    write(folder, weights)
    assert f"with {shape}" in refusal(folder)


@pytest.mark.parametrize("kind", [torch.float64, torch.int32, torch.float8_e5m2])
def test_other_types_are_refused(folder, kind):
    weights = change(folder)
    weights[PROJECTION] = weights[PROJECTION].to(kind)
    write(folder, weights)
    assert f"{PROJECTION} is of type" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up_proj.weight"],
)
def test_what_would_change_the_model_is_not_left_unread(folder, name):
    weights = change(folder)
    weights[name] = torch.ones(4)
    write(folder, weights)
    assert f"has the weights {name}" in refusal(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(folder, value):
    weights = change(folder)
    weights[PROJECTION][0, 0] = value
    write(folder, weights)
    check_weights(folder, read_drafter_config(folder))  # which reads no weight
    with pytest.raises(UnsupportedDrafterError, match="not finite"):
        load_drafter(folder, max_positions=8)


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("{", "is no index of weights"),
        ("[]", "is no index of weights"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": {"a": 7}}', "is no index of weights"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names ../model"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names /etc/passwd"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(folder, text, mention):
    (folder / "model.safetensors.index.json").write_text(text)
    assert mention in refusal(folder)


def test_who_may_read_a_config_may_read_the_weights(tmp_path):
    (tmp_path / "config.json").touch(mode=0o640)
    write_weights(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert load_file(tmp_path / "model.safetensors")["x"].tolist() == [1, 1]


def test_no_other_place_writes_weights():
    users = [
        path.name
        for path in source_files()
        if "save_file" in path.read_text(encoding="utf-8")
    ]
    assert users == ["weights.py"]
