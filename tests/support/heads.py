"""Random EAGLE-3 heads in the layouts of the field, and a target for them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from tests.support import models

#: Of the target's layers, how many were passed before each state that a head reads.
AUX_LAYERS = [1, 2, 3]
TARGET: dict[str, Any] = {"num_hidden_layers": 4}
NUM_DRAFTED = 40


def target_config(**changes: Any) -> PretrainedConfig:
    return models.llama(**{**TARGET, **changes})


def head_config(**changes: Any) -> dict[str, Any]:
    """Of SpecForge's layout, for a target as above."""
    config = models.llama(num_hidden_layers=1)
    keys = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
        *("max_position_embeddings", "hidden_act", "rope_parameters"),
    )
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **{key: getattr(config, key) for key in keys},
        "tie_word_embeddings": False,
        "draft_vocab_size": NUM_DRAFTED,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": AUX_LAYERS,
            "use_aux_hidden_state": True,
        },
        **changes,
    }


def random_weights(
    config: dict[str, Any], layer: str = "midlayer", seed: int = 5, scale: float = 0.2
) -> dict[str, Tensor]:
    """As a head has them, less its embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return scale * torch.randn(rows, columns, generator=generator)

    def norm(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config["head_dim"]
    drafted, vocabulary = config["draft_vocab_size"], config["vocab_size"]
    ids = torch.randperm(vocabulary, generator=generator)[:drafted].sort().values
    is_drafted = torch.zeros(vocabulary, dtype=torch.bool)
    is_drafted[ids] = True
    weights = {
        "fc.weight": matrix(hidden, 3 * hidden),
        f"{layer}.self_attn.q_proj.weight": matrix(heads * head, 2 * hidden),
        f"{layer}.self_attn.k_proj.weight": matrix(kv_heads * head, 2 * hidden),
        f"{layer}.self_attn.v_proj.weight": matrix(kv_heads * head, 2 * hidden),
        f"{layer}.self_attn.o_proj.weight": matrix(hidden, heads * head),
        f"{layer}.mlp.gate_proj.weight": matrix(inner, hidden),
        f"{layer}.mlp.up_proj.weight": matrix(inner, hidden),
        f"{layer}.mlp.down_proj.weight": matrix(hidden, inner),
        f"{layer}.input_layernorm.weight": norm(hidden),
        f"{layer}.hidden_norm.weight": norm(hidden),
        f"{layer}.post_attention_layernorm.weight": norm(hidden),
        "norm.weight": norm(hidden),
        "lm_head.weight": matrix(drafted, hidden),
        "d2t": ids - torch.arange(drafted),
        "t2d": is_drafted,
    }
    if config.get("norm_before_fc"):
        weights["input_norm.weight"] = norm(3 * hidden)
    if config.get("fc_norm"):
        weights |= {f"fc_norm.{index}.weight": norm(hidden) for index in range(3)}
    return weights


def write_head(folder: Path, **changes: Any) -> Path:
    """In SpecForge's layout."""
    config = head_config(**changes)
    return _write(folder, config, random_weights(config))


def write_speculators_head(folder: Path, **changes: Any) -> Path:
    """The same weights in the layout of speculators."""
    config = head_config(**changes)
    of_layer = {
        key: value
        for key, value in config.items()
        if key not in ("architectures", "draft_vocab_size", "eagle_config")
    }
    whole = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": config["draft_vocab_size"],
        "norm_before_residual": config.get("norm_before_residual", True),
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": AUX_LAYERS,
        "transformer_layer_config": of_layer,
    }
    return _write(folder, whole, random_weights(config, "layers.0"))


def _write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder
