"""What the drafter's folder says about the model in it."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import cached_file

from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.errors import ConfigurationError, UnsupportedDrafterError, short

#: Llama-family decoders: RMSNorm, rotary embedding, gated SiLU, grouped queries.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
#: And the most of each; far from what any such model has.
SIZES = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**31,
}
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
    raw = read_json(path, str(folder))
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not (
        set(map(str, architectures)) & set(ARCHITECTURES)
    ):
        raise UnsupportedDrafterError(
            f"model={str(folder)!r} is "
            f"{short(architectures or 'of no named architecture')}; "
            f"drafters are one of {', '.join(ARCHITECTURES)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers validates with several kinds
        raise UnsupportedDrafterError(
            f"{path} is no valid config ({short(error)}); mend it, or download it anew"
        ) from error
    check_drafter_config(config, str(folder))
    check_numbers(config, path)
    return config


def check_numbers(
    config: PretrainedConfig, path: Path, more: Sequence[str] = ()
) -> None:
    """Of a drafter's config, that sizes are sizes and the rest can be computed with.

    Args:
        path: of the config.
        more: sizes beside those that every drafter has.

    Raises:
        UnsupportedDrafterError: they are not.
    """
    for key, most in (SIZES | dict.fromkeys(more, SIZES["vocab_size"])).items():
        size = head_dim(config) if key == "head_dim" else getattr(config, key)
        if type(size) is not int or not 0 < size <= most:
            raise UnsupportedDrafterError(
                f"{path}: {key}={short(repr(size))} is no size; it must be a whole "
                f"number from 1 to {most}: mend it, or download it anew"
            )
    eps = config.rms_norm_eps
    if not math.isfinite(eps) or eps < 0:
        raise UnsupportedDrafterError(
            f"{path}: rms_norm_eps={eps!r} must be a number from 0 on: mend it, or "
            "download it anew"
        )
    try:
        frequencies, scaling = rotary_frequencies(config)
        why = "" if frequencies.isfinite().all() and math.isfinite(scaling) else "none"
    except Exception as error:  # transformers computes with whatever stands there
        why = short(error)
    if why:
        raise UnsupportedDrafterError(
            f"{path}: rope_parameters={short(config.rope_parameters)} give no finite "
            f"angles ({why}): mend them, or download it anew"
        )


def read_json(path: Path, folder: str) -> dict[str, Any]:
    """``config.json`` of a drafter's folder; raises UnsupportedDrafterError."""
    try:
        is_there = path.is_file()
        raw = json.loads(path.read_text(encoding="utf-8")) if is_there else None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedDrafterError(
            f"{str(path)[:200]} is not JSON, or cannot be read ({short(error)}); "
            "download or copy it anew"
        ) from error
    if not is_there:
        raise UnsupportedDrafterError(
            f"model={folder[:200]!r} holds no config.json; give the folder of a "
            "drafter in the Hugging Face layout"
        )
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
            f"{name}: model_type={short(repr(config.model_type))}; drafters are one of "
            f"{', '.join(ARCHITECTURES.values())}"
        )
    if config.hidden_act != "silu":
        raise UnsupportedDrafterError(
            f"{name}: hidden_act={short(repr(config.hidden_act))}; drafters use 'silu'"
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES:
        raise UnsupportedDrafterError(
            f"{name}: rope_type={short(repr(rope_type))} depends on the input's "
            f"length; drafters use one of {', '.join(STATIC_ROPE_TYPES)}"
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
    if given is None:
        given = config.hidden_size // config.num_attention_heads
    return given
