"""A drafter's folder, as files, with one or two things wrong."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

from tests.support.junk import junk, spoilt, spoilt_bytes, written

#: Content by name.
Files = dict[str, bytes]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
TYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"),
    *("F8_E4M3", "F8_E5M2", "U16", "C64", "F4", "X", "", 7),
)
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8),
    *(torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
)
STRANGE = (math.nan, math.inf, -math.inf, 0.0, 3e38)
#: Of configs of such models, beside those that a tiny one has.
KEYS: dict[str, Any] = {
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "sliding_window": 64,
    "layer_types": ["full_attention"],
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_theta": 500.0,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]},
    "budgetdraft": {
        "eviction_policy": "sink_window",
        "sink_tokens": 4,
        "chunk_size": 8,
    },
    "torch_dtype": "float16",
    "dtype": "float32",
    "auto_map": {"AutoConfig": "remote.Config"},
    "partial_rotary_factor": 0.5,
    "pretraining_tp": 2,
    "draft_tokens": 4,
}


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoil(rng: Random, files: Files) -> list[str]:
    """Changes files, in place, and says how."""
    ways = rng.choices(WAYS, SHARES, k=rng.choice((1, 1, 1, 2)))
    return [f"{way.__name__}: {way(rng, files)}" for way in ways]


def _config_value(rng: Random, files: Files) -> Any:
    config = _config(files)
    known = {**KEYS, **config}
    key = rng.choice(list(known))
    config[key] = spoilt(rng, known[key])
    files[CONFIG] = written(config)
    return key, config[key]


def _config_key(rng: Random, files: Files) -> Any:
    config = _config(files)
    key = rng.choice(list({**KEYS, **config}))
    if rng.random() < 0.5:
        config[key] = KEYS.get(key)
    else:
        config.pop(key, None)
    files[CONFIG] = written(config)
    return key, config.get(key, "gone")


def _config_part(rng: Random, files: Files) -> Any:
    """Of an object within: how keys are rotated, what was trained, what are codes."""
    config = _config(files)
    key = rng.choice(("rope_parameters", "budgetdraft", "quantization_config"))
    part = config.get(key) or KEYS.get(key)
    if not isinstance(part, dict):
        return _config_value(rng, files)
    rope = {"rope_type": rng.choice(("llama3", "yarn", "linear", "default"))}
    rope |= dict.fromkeys(("factor", "low_freq_factor", "attention_factor"), 2.0)
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    part = {**part, **(rope if key == "rope_parameters" else {})}
    name = rng.choice(list(part))
    config[key] = part | {name: spoilt(rng, part[name])}
    files[CONFIG] = written(config)
    return key, config[key]


def _file(rng: Random, files: Files) -> Any:
    name = rng.choice(list(files))
    files[name] = spoilt_bytes(rng, files[name])
    return name, len(files[name]), files[name][:40]


def _no_file(rng: Random, files: Files) -> Any:
    name = rng.choice(list(files))
    del files[name]
    return name


def _object_file(rng: Random, files: Files) -> Any:
    """Of a tokenizer, most often."""
    name = rng.choice([each for each in files if each.endswith(".json")] or [CONFIG])
    try:
        found = json.loads(files[name])
    except (KeyError, ValueError, RecursionError):
        found = {}
    files[name] = written(spoilt(rng, found))
    return name, files[name][:200]


def _header(rng: Random, files: Files) -> Any:
    """Of safetensors: 8 bytes that say how long it is, JSON, and the numbers."""
    content = files.get(WEIGHTS, b"")
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
        name = rng.choice([each for each in header if each != "__metadata__"])
        tensor = header[name]
        way = rng.randrange(8)
        if way == 0:
            tensor["dtype"] = rng.choice(TYPES)
        elif way == 1:
            tensor["shape"] = spoilt(rng, tensor["shape"])
        elif way == 2:
            tensor["data_offsets"] = spoilt(rng, tensor["data_offsets"])
        elif way == 3:
            tensor["shape"] = tensor["shape"][::-1]
        elif way == 4:
            header[str(spoilt(rng, name))[:200]] = header.pop(name)
        elif way == 5:
            other = rng.choice([each for each in header if each != "__metadata__"])
            header[name], header[other] = header[other], header[name]
        elif way == 6:
            header["__metadata__"] = junk(rng)
        else:
            header[name] = spoilt(rng, tensor)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return _file(rng, files)  # spoilt already
    text = written(header)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63))
    files[WEIGHTS] = length.to_bytes(8, "little") + text + content[end:]
    return way, name, str(header.get(name))[:200]


def _tensors(rng: Random, files: Files) -> Any:
    try:
        tensors = load(files[WEIGHTS])
        name = rng.choice(sorted(tensors))
        value = tensors[name].float()
    except Exception:  # spoilt already
        return _file(rng, files)
    way = rng.randrange(9)
    if way == 0:
        value = value.clone()
        value.view(-1)[rng.randrange(max(1, value.numel()))] = rng.choice(STRANGE)
    elif way == 1:
        value = value.to(rng.choice(DTYPES))
    elif way in (2, 3, 4):
        code = rng.choice((torch.int8, torch.float8_e4m3fn))
        scale = rng.choice((value.abs().max() / 100, torch.tensor(float("nan"))))
        rows = len(value) if value.ndim else 1
        shapes = ([], [1], [rows], [rows, 1], [4], [1, rows], [0])
        scales = scale.expand(rng.choice(shapes)).contiguous()
        to = rng.choice((torch.float32, torch.bfloat16, torch.float16, *DTYPES))
        tensors[name + rng.choice(("_scale", "_scale_inv"))] = scales.to(to)
        value = (value / scale).nan_to_num().to(code)
    elif way == 5:
        value = value.reshape(-1)[rng.randrange(3) :]
    elif way == 6:
        value = value.T if value.ndim == 2 else value[None]
    elif way == 7:
        ends = ("_scale", "_zero_point", ".bias", "_shape", "input_scale", "rotary_emb")
        tensors[name.removesuffix(".weight") + rng.choice(ends)] = torch.ones(1)
    else:
        del tensors[name]
    if way != 8:
        tensors[name] = value.contiguous()
    if rng.random() < 0.1:
        tensors["lm_head" + rng.choice((".bias", ".weight_scale"))] = torch.ones(3)
    files[WEIGHTS] = save(tensors, metadata={"format": "pt"})
    return way, name, tuple(value.shape), value.dtype


def _index(rng: Random, files: Files) -> Any:
    names = ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")
    index = {"metadata": {"total_size": 7}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    where = rng.choice((WEIGHTS, "../" + WEIGHTS, "/dev/zero", "other", "", ".", 3))
    index["weight_map"] |= {rng.choice(names): where}
    files[INDEX] = written(spoilt(rng, index) if rng.random() < 0.6 else index)
    return files[INDEX][:300]


def _config(files: Files) -> dict[str, Any]:
    try:
        found = json.loads(files[CONFIG])
    except (KeyError, ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


_SHARES = {
    _config_value: 8,
    _config_key: 2,
    _config_part: 3,
    _file: 3,
    _no_file: 1,
    _object_file: 2,
    _header: 6,
    _tensors: 6,
    _index: 2,
}
WAYS, SHARES = list(_SHARES), list(_SHARES.values())
