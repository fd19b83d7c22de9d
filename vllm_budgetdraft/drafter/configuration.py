"""What the drafter's folder says about the model in it."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import cached_file

from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.errors import ConfigurationError, UnsupportedDrafterError

#: Llama-family decoders: RMSNorm, rotary embedding, gated SiLU, grouped queries.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
#: Rotary schemes whose angles do not depend on the length of the input.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def folder_of(model: str) -> str:
    """Where a drafter is: a folder, or the name of a model in the hub's local cache.

    Raises:
        UnsupportedDrafterError: it looks like such a name, and is not there.
    """
    path = Path(model).expanduser()
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return str(path)
    try:
        config = cached_file(model, "config.json", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedDrafterError(
            f"model={model!r} is no folder, and the hub's cache has no model of that "
            f"name; download it (hf download {model}), or give a drafter's folder"
        ) from error
    return str(Path(config).parent)


def read_drafter_config(folder: str | Path) -> PretrainedConfig:
    """Reads and checks ``config.json`` of a drafter.

    Raises:
        UnsupportedDrafterError: the folder or its config is missing, or the model is
            not of the Llama family.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path, str(folder))
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not (
        set(map(str, architectures)) & set(ARCHITECTURES)
    ):
        raise UnsupportedDrafterError(
            f"model={str(folder)!r} is {architectures or 'of no named architecture'}; "
            f"drafters are one of {', '.join(ARCHITECTURES)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers validates with several kinds
        raise UnsupportedDrafterError(
            f"{path} is no valid config ({error}); mend it, or download it anew"
        ) from error
    check_drafter_config(config, str(folder))
    for key in SIZES:
        if type(size := getattr(config, key)) is not int or size < 1:
            raise UnsupportedDrafterError(
                f"{path}: {key}={size!r} is no size; it must be a whole number from 1 "
                "on: mend it, or download it anew"
            )
    return config


def _read_json(path: Path, folder: str) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise UnsupportedDrafterError(
                f"model={folder[:200]!r} holds no config.json; give the folder of a "
                "drafter in the Hugging Face layout"
            )
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedDrafterError(
            f"{str(path)[:200]} is not JSON, or cannot be read ({str(error)[:200]}); "
            "download or copy it anew"
        ) from error
    if not isinstance(raw, dict):
        raise UnsupportedDrafterError(
            f"{path} holds a {type(raw).__name__}, not an object; download or copy it "
            "anew"
        )
    return raw


def check_drafter_config(config: PretrainedConfig, name: str) -> None:
    """Raises UnsupportedDrafterError for a feature that the drafter's model lacks."""
    if config.model_type not in ARCHITECTURES.values():
        raise UnsupportedDrafterError(
            f"{name}: model_type={config.model_type!r}; drafters are one of "
            f"{', '.join(ARCHITECTURES.values())}"
        )
    if config.hidden_act != "silu":
        raise UnsupportedDrafterError(
            f"{name}: hidden_act={config.hidden_act!r}; drafters use 'silu'"
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES:
        raise UnsupportedDrafterError(
            f"{name}: rope_type={rope_type!r} depends on the input's length; drafters "
            f"use one of {', '.join(STATIC_ROPE_TYPES)}"
        )


def trained_view(drafter: PretrainedConfig) -> dict[str, Any]:
    """What its training wrote of itself; nothing if it was trained elsewhere.

    Raises:
        UnsupportedDrafterError: something else stands there.
    """
    return check_trained(getattr(drafter, "budgetdraft", None))


def check_trained(found: Any) -> dict[str, Any]:
    """See ``trained_view``, of what ``config.json`` has under ``budgetdraft``."""
    if not isinstance(found, dict | None):
        raise UnsupportedDrafterError(
            f"budgetdraft in the drafter's config.json is a {type(found).__name__}, "
            "not an object; take config.json as training wrote it"
        )
    return found or {}


def check_native_range(
    config: SettledConfig, drafter: PretrainedConfig, max_model_len: int
) -> None:
    """Raises ConfigurationError if cache_relative positions leave the native range."""
    if config.position_mode == "absolute":
        return
    native = drafter.max_position_embeddings
    rows = {
        "the draft cache (kv_budget, recent_window and the drafts)": (
            config.cache_capacity(max_model_len),
            "lower kv_budget or recent_window",
        ),
        f"a prompt read with draft_prefill={config.draft_prefill!r}": (
            config.held_tokens(max_model_len, native),
            "use draft_prefill='streaming'",
        ),
    }
    for what, (tokens, remedy) in rows.items():
        if tokens > native:
            raise ConfigurationError(
                f"position_mode='cache_relative': {what} takes {tokens} positions, "
                f"the drafter was made for {native} (max_position_embeddings); {remedy}"
            )


def range_warning(
    config: SettledConfig, drafter: PretrainedConfig, max_model_len: int
) -> str | None:
    """Why drafts of long contexts may be poor, if they may."""
    native = drafter.max_position_embeddings
    if config.position_mode != "absolute" or max_model_len <= native:
        return None
    return (
        f"max_model_len={max_model_len} is beyond the {native} tokens that the drafter "
        "was made for (max_position_embeddings): drafts there may be poor; "
        "position_mode='cache_relative' keeps its positions below"
    )


def rotary_frequencies(config: PretrainedConfig) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2], and the factor on cos and sin (YaRN)."""
    # The rotary module of Llama reads nothing that the four families spell differently.
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


def head_dim(config: PretrainedConfig) -> int:
    given: int | None = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads
