"""A pair of Llamas in the Hugging Face layout, out of a GGUF file and layers.

``transformers`` reads weights of GGUF, too, to the same bits and more slowly.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from vllm_budgetdraft.drafter.checkpoint import EMBEDDING, WEIGHTS
from vllm_budgetdraft.drafter.weights import write_weights
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.pretrained.source import CONFIG, LAYERS, VOCABULARY

#: GGUF's names of weights, and Hugging Face's.
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_pair(model: Path, layers: Path, folder: Path) -> None:
    """Writes ``target`` and ``drafter``, in bf16, each with tokenizer and template.

    Args:
        model: GGUF, of a Llama with tied embeddings, which are the drafter's too.
        layers: folder of the drafter's own weights, and of its config, which is also
            the target's but for the number of layers.

    Raises:
        ConfigurationError: the drafter's own weights are damaged.
    """
    file = layers / LAYERS
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ConfigurationError(
            f"{file} is not safetensors ({error}); download it anew, whole: Git LFS "
            "leaves a small text in its place"
        ) from error
    config = json.loads((layers / CONFIG).read_text(encoding="utf-8"))
    del config["budgetdraft"]  # of drafters alone
    target, drafter = folder / "target", folder / "drafter"
    target.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    tokenizer.save_pretrained(target)
    shutil.copytree(target, drafter)
    for name in (CONFIG, VOCABULARY):
        if (layers / name).is_file():
            shutil.copyfile(layers / name, drafter / name)
    weights[EMBEDDING] = _write_target(target, model, config)
    write_weights(drafter / WEIGHTS, weights)


def _write_target(folder: Path, model: Path, config: dict[str, Any]) -> Tensor:
    """Writes all but the tokenizer.

    Returns:
        The embeddings: [vocab_size, hidden_size].
    """
    reader = GGUFReader(model)
    layers = reader.fields["llama.block_count"].contents()
    _write_json(folder / CONFIG, config | {"num_hidden_layers": layers})
    # vLLM takes from it where an answer ends.
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    ends = {name: config[name] for name in special}
    _write_json(folder / "generation_config.json", ends)
    weights = _read_weights(reader, config)
    write_weights(folder / WEIGHTS, weights)
    return weights[EMBEDDING]


def _read_weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, Tensor]:
    """By Hugging Face's names."""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for tensor in reader.tensors:
        # blk.7.attn_q.weight, output_norm.weight
        *block, kind, _ = tensor.name.split(".")
        layer = f"layers.{block[1]}." if block else ""
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if kind in heads:
            values = _in_halves(values, heads[kind])
        name = f"model.{layer}{NAMES[kind]}.weight"
        weights[name] = values.to(torch.bfloat16)
    return weights


def _in_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows for rotary embeddings of halves, from GGUF's, which turns neighbours.

    Args:
        weight: [num_heads * head_dim, hidden_size].
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
