"""Tiny random Hugging Face models: any size, every family, no download."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 97

#: Odd sizes on purpose: the heads together are wider than the hidden size, hardly
#: anything is a power of two, and no two sizes are the same.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 71,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 2048,
}


def llama(**changes: Any) -> PretrainedConfig:
    return LlamaConfig(**{**SIZES, **changes})


def mistral(**changes: Any) -> PretrainedConfig:
    return MistralConfig(**{**SIZES, "sliding_window": None, **changes})


def qwen2(**changes: Any) -> PretrainedConfig:
    return Qwen2Config(**{**SIZES, **changes})


def qwen3(**changes: Any) -> PretrainedConfig:
    return Qwen3Config(**{**SIZES, **changes})


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model all of whose weights matter: biases are not 0, norms are not 1.

    Weights are so large that what attention sees decides the next token. With the
    usual small ones a model would repeat itself whatever its cache held.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        # The one row of another scale: hidden states enter as if normed.
        model.get_input_embeddings().weight.normal_()
    return model.requires_grad_(False)


def write_model(folder: Path, config: PretrainedConfig, seed: int = 0) -> Path:
    """Writes a random model's folder, in float32, and returns it."""
    random_model(config, seed).save_pretrained(folder)
    return folder


def read_model(folder: Path) -> PreTrainedModel:
    """The folder as ``transformers`` loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_tokens(count: int, seed: int = 0) -> Tensor:
    """[count] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (count,), generator=generator)
