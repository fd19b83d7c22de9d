"""EAGLE-3 heads in the layouts of the field: SpecForge's, and speculators'.

Both hold one decoder layer, ``fc`` over the target's states, a norm and a head of their
own, and what is added to the place of a logit for its token (``d2t``). The target's
embeddings may be left out. They differ in the layer's name and in ``config.json``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from vllm_budgetdraft.drafter.checkpoint import LAYER_NAMES, WEIGHTS
from vllm_budgetdraft.drafter.configuration import (
    check_drafter_config,
    check_numbers,
    read_json,
)
from vllm_budgetdraft.drafter.draft_vocabulary import OFFSETS
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.drafter.weights import StoredWeights, write_weights
from vllm_budgetdraft.errors import UnsupportedDrafterError, short

#: What ``architectures`` says of a head, and the family of its layer.
ARCHITECTURES = {
    "LlamaForCausalLMEagle3": "llama",
    "Eagle3LlamaForCausalLM": "llama",
    "Eagle3Qwen3ForCausalLM": "qwen3",
}
#: What ``speculators_model_type`` says.
SPECULATORS = "eagle3"
#: Settings of a head that a config may have, and what they are if it has not.
DEFAULTS = {
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
}
EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
NAMES = {
    "embedding": EMBEDDING,
    "norm": "norm.weight",
    "lm_head": LM_HEAD,
    "fc_weight": "fc.weight",
    "input_norm": "input_norm.weight",
}
#: A layer's name in a folder, the first layer's alone and every layer's.
FIRST, EVERY = "midlayer", "layers.{}"
#: Of no account: masks of ``d2t``.
IGNORED = ("t2d", OFFSETS)


def is_feature_drafter(folder: str | Path) -> bool:
    """Whether a folder says that it holds an EAGLE-3 head."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    raw = read_json(path, str(folder))
    named = raw.get("architectures")
    names = set(map(str, named)) if isinstance(named, list) else set()
    return bool(names & set(ARCHITECTURES)) or (
        raw.get("speculators_model_type") == SPECULATORS
    )


def read_feature_config(folder: str | Path) -> PretrainedConfig:
    """Reads and checks ``config.json`` of an EAGLE-3 head, of either layout.

    Returns:
        That of its layer, with what is said of the head: ``draft_vocab_size``,
        ``target_hidden_size``, ``aux_layers``, ``num_aux_layers`` and ``DEFAULTS``.

    Raises:
        UnsupportedDrafterError: the folder or its config is missing; or it is no head,
            or one of another kind, or with sizes that are none.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path, str(folder))
    if not is_feature_drafter(folder):
        raise UnsupportedDrafterError(
            f"{path} is of no EAGLE-3 head: architectures="
            f"{short(raw.get('architectures'))}; these are one of "
            f"{', '.join(ARCHITECTURES)}, or have speculators_model_type="
            f"{SPECULATORS!r}"
        )
    defaults = dict(DEFAULTS)
    layer: Any = raw
    if raw.get("speculators_model_type") == SPECULATORS:
        layer = raw.get("transformer_layer_config")
        defaults["norm_before_residual"] = True
    nested = raw.get("eagle_config")
    said = raw | (nested if isinstance(nested, dict) else {})
    try:
        names = {"architectures", "model_type", "auto_map", "torch_dtype", "dtype"}
        settings = {k: v for k, v in layer.items() if k not in names}
        family = layer.get("model_type", "llama")
        config = AutoConfig.for_model(family, **settings)
        config.tie_word_embeddings = False  # whatever was copied from the target
        for key, value in defaults.items():
            setattr(config, key, bool(said.get(key, value)))
        config.draft_vocab_size = said.get("draft_vocab_size") or config.vocab_size
        config.target_hidden_size = said.get("target_hidden_size") or config.hidden_size
        layers = said.get("eagle_aux_hidden_state_layer_ids")
        config.aux_layers = sorted(map(int, layers)) if layers else None
        config.num_aux_layers = int(
            said.get("num_aux_hidden_states") or len(config.aux_layers or (0,) * 3)
        )
        config.budgetdraft = raw.get("budgetdraft")
    except Exception as error:  # transformers validates with several kinds
        raise UnsupportedDrafterError(
            f"{path} is no valid config ({short(error)}); mend it, or download it anew"
        ) from error
    if said.get("use_aux_hidden_state") is False or said.get("parallel_drafting"):
        raise UnsupportedDrafterError(
            f"{path}: heads that read the target's last state alone "
            "(use_aux_hidden_state=false), or draft in parallel, are not supported; "
            "give an EAGLE-3 head"
        )
    check_drafter_config(config, str(folder))
    check_numbers(config, path, ("draft_vocab_size", "target_hidden_size"))
    return config


def load_feature_drafter(
    folder: str | Path,
    *,
    max_positions: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    embedding: Tensor | None = None,
) -> FeatureDrafter:
    """Loads an EAGLE-3 head, for serving or further training.

    Args:
        embedding: the target's, [vocab_size, hidden_size], for a folder that has none;
            it is taken as it is, wherever it lies.

    Raises:
        UnsupportedDrafterError: see ``read_feature_config`` and ``StoredWeights``; or
            there are no embeddings.
    """
    config = read_feature_config(folder)
    stored = check_feature_weights(folder, config, has_embedding=embedding is not None)
    drafter = FeatureDrafter(config, max_positions)
    is_shared = stored.lacks(EMBEDDING)
    if is_shared:
        drafter.embedding = nn.Parameter(torch.empty(0))
    state = drafter.state_dict()
    for name in state:
        if name == "embedding" and is_shared:
            continue
        parts = _names(name, stored)
        state[name] = torch.cat([stored.read(part) for part in parts])
    drafter.load_state_dict(state)
    drafter.draft_ids = draft_ids(stored, config)
    drafter = drafter.to(device=device, dtype=dtype).eval()
    drafter.shares_embedding = is_shared
    if is_shared:
        assert embedding is not None
        drafter.embedding = nn.Parameter(embedding, requires_grad=False)
    return drafter.requires_grad_(False)


def check_feature_weights(
    folder: str | Path, config: PretrainedConfig, *, has_embedding: bool
) -> StoredWeights:
    """The weights of a folder, of which none is read.

    Raises:
        UnsupportedDrafterError: see ``load_feature_drafter``.
    """
    stored = StoredWeights(Path(folder), WEIGHTS)
    with torch.device("meta"):
        drafter = FeatureDrafter(config, max_positions=1)
    expected: dict[str, tuple[int, ...]] = {}
    for name, value in drafter.state_dict().items():
        parts = _names(name, stored)
        sizes = _sizes(name, drafter, len(value), len(parts))
        for part, rows in zip(parts, sizes, strict=True):
            expected[part] = (rows, *value.shape[1:])
    if stored.lacks(EMBEDDING) and has_embedding:
        expected.pop(EMBEDDING)
    stored.check(expected, ignored=(*IGNORED, LM_HEAD))
    if config.draft_vocab_size != config.vocab_size and stored.lacks(OFFSETS):
        raise UnsupportedDrafterError(
            f"{folder} drafts {config.draft_vocab_size} of {config.vocab_size} tokens, "
            f"and lacks {OFFSETS}, which says which; download or copy it anew"
        )
    return stored


def draft_ids(stored: StoredWeights, config: PretrainedConfig) -> Tensor | None:
    """The token of each logit, [draft_vocab_size] int64; None for all tokens."""
    if config.draft_vocab_size == config.vocab_size:
        return None
    offsets = stored.read(OFFSETS).long()
    ids = offsets + torch.arange(len(offsets))
    known = (ids >= 0) & (ids < config.vocab_size)
    different = len(ids[known].unique())
    if not len(ids) == different == config.draft_vocab_size:
        raise UnsupportedDrafterError(
            f"{OFFSETS} has {len(ids)} tokens, of which {different} are different ones "
            f"of the vocabulary; config.json says {config.draft_vocab_size} "
            f"(draft_vocab_size) of {config.vocab_size}: download or copy both anew"
        )
    return ids


def save_feature_drafter(
    drafter: FeatureDrafter,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state: dict[str, Tensor] | None = None,
    with_embedding: bool = False,
) -> None:
    """Writes a folder in SpecForge's layout, which vLLM's ``eagle3`` loads too."""
    folder.mkdir(parents=True, exist_ok=True)
    config = drafter.config
    weights: dict[str, Tensor] = {}
    for name, value in (state or drafter.state_dict()).items():
        if name == "embedding" and not with_embedding:
            continue
        parts = _names(name, None)
        sizes = _sizes(name, drafter, len(value), len(parts))
        for part, rows in zip(parts, value.split(sizes), strict=True):
            weights[part] = rows.to("cpu", dtype).contiguous()
    ids = drafter.draft_ids
    if ids is not None:
        weights[OFFSETS] = ids.cpu() - torch.arange(len(ids))
        drafted = torch.zeros(config.vocab_size, dtype=torch.bool)
        drafted[ids.cpu()] = True
        weights["t2d"] = drafted
    config.architectures = ["LlamaForCausalLMEagle3"]
    config.eagle_config = {"use_aux_hidden_state": True}
    if config.aux_layers:
        config.eagle_config["eagle_aux_hidden_state_layer_ids"] = config.aux_layers
    config.dtype = dtype
    config.save_pretrained(folder)
    write_weights(folder / WEIGHTS, weights)


def _sizes(name: str, drafter: FeatureDrafter, rows: int, parts: int) -> list[int]:
    """Rows of each part that a weight of ours stacks."""
    if "qkv_" in name:
        heads = drafter.num_heads, drafter.num_kv_heads, drafter.num_kv_heads
        return [each * drafter.head_dim for each in heads]
    return [rows // parts] * parts


def _names(name: str, stored: StoredWeights | None) -> list[str]:
    """Names in a folder of what a weight of ours stacks."""
    if name == "fc_norms":
        count = 3 if stored is None else sum(n.startswith("fc_norm.") for n in stored)
        return [f"fc_norm.{index}.weight" for index in range(count)]
    if name in NAMES:
        return [NAMES[name]]
    _, index, own_name = name.split(".")
    layer = EVERY.format(index)
    is_named = stored is not None and any(n.startswith(f"{layer}.") for n in stored)
    if index == "0" and not is_named:
        layer = FIRST
    if own_name == "hidden_norm":
        return [f"{layer}.hidden_norm.weight"]
    return [f"{layer}.{part}" for part in LAYER_NAMES[own_name]]
