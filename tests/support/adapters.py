"""LoRA adapters with nothing learned in them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def write_adapter(folder: Path, target: str) -> str:
    """Writes an adapter that changes what the target says; returns its folder."""
    config = json.loads((Path(target) / "config.json").read_text())
    width = config["hidden_size"]
    random_numbers = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name in PROJECTIONS:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("A", (RANK, width)), ("B", (width, RANK))):
                weight = torch.randn(shape, generator=random_numbers) / 8
                weights[f"{prefix}.lora_{part}.weight"] = weight
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": PROJECTIONS,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)
