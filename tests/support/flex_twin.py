"""FlexDraft's mask tokens spelled out: one query, one layer, one softmax at a time."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from tests.support import models
from tests.support.engines import FLEXDRAFT
from vllm_budgetdraft.flexdraft.modeling import FlexDraft, begin_as_target

NUM_LAYERS, RANK = 2, 5


def random_drafter(target: PreTrainedModel, seed: int = 0, **changes: Any) -> FlexDraft:
    """All of whose weights matter, and none is the target's."""
    sizes = {"num_layers": NUM_LAYERS, "calibration_rank": RANK, "max_positions": 512}
    sizes["drafts_blind"] = not changes.get("sees_bonus")
    drafter = FlexDraft(target.config, **{**sizes, **changes})
    torch.manual_seed(seed)
    begin_as_target(drafter, target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            wide = parameter.ndim == 2 and parameter.numel() > 0
            scale = parameter.shape[-1] ** -0.5 if wide else 0.3
            parameter.add_(scale * torch.randn_like(parameter))
    return drafter.eval().requires_grad_(False)


def blind(folder: Path) -> str:
    """The embedded drafter, as if it had learnt to do without the bonus token."""
    shutil.copytree(FLEXDRAFT, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"drafts_blind": True}))
    return str(folder)


def random_target(family: Any = models.llama, **changes: Any) -> PreTrainedModel:
    return models.random_model(family(**changes))


@torch.no_grad()
def twin_logits(
    target: PreTrainedModel,
    drafter: FlexDraft,
    context: list[int],
    bonus: int,
    num_drafts: int,
    seen: Tensor | None = None,
    forced: list[int] | None = None,
    is_told: bool = True,
) -> Tensor:
    """Logits of the drafts after ``context`` and the bonus token, [k, V].

    Args:
        seen: [layers, G, len(context)] bool; None for all of it.
        forced: the bonus token and those after it, where drafts go by the token before
            them; None for the likeliest ones.
        is_told: whether the mask tokens know the bonus token, where they can.
    """
    cache = DynamicCache()
    target.model(torch.tensor([context]), past_key_values=cache)
    rotary = LlamaRotaryEmbedding(target.config)
    x = drafter.mask_embedding.repeat(num_drafts + 1, 1)
    if drafter.sees_bonus and is_told:
        x = x + drafter.bonus_in @ target.model.embed_tokens.weight[bonus]
    positions = torch.arange(len(context), len(context) + num_drafts + 1)
    cos, sin = rotary(x[None], positions[None])
    first = len(target.model.layers) - drafter.num_layers
    for depth, own in enumerate(drafter.layers):
        theirs = target.model.layers[first + depth]
        states = cache.layers[first + depth]
        heads, kv_heads = own.heads
        size = own.head_dim
        projected = theirs.input_layernorm(x) @ own.qkv_weight.T
        if own.qkv_bias is not None:
            projected = projected + own.qkv_bias
        q, k, v = projected.split((heads * size, kv_heads * size, kv_heads * size), -1)
        q, k, v = (each.unflatten(-1, (-1, size)).transpose(0, 1) for each in (q, k, v))
        if own.has_qk_norms:
            q, k = _norm(q, own.q_norm, own.eps), _norm(k, own.k_norm, own.eps)
        q, k = (each[0] for each in apply_rotary_pos_emb(q[None], k[None], cos, sin))
        out = torch.empty(num_drafts + 1, heads, size)
        for head in range(heads):
            of = head // (heads // kv_heads)
            keep = slice(None) if seen is None else seen[depth, of]
            keys = torch.cat([states.keys[0, of][keep], k[of]])
            values = torch.cat([states.values[0, of][keep], v[of]])
            for mask in range(num_drafts + 1):
                logits = keys @ q[head, mask] / size**0.5
                out[mask, head] = logits.softmax(-1) @ values
        output = out.flatten(1) @ own.o_weight.T
        if own.o_bias is not None:
            output = output + own.o_bias
        x = x + output
        x = x + theirs.mlp(theirs.post_attention_layernorm(x))
    logits = []
    for hidden in target.model.norm(x)[1:]:
        known = target.model.embed_tokens.weight[bonus]
        inner = drafter.calibration_in @ torch.cat([known, hidden])
        inner = torch.nn.functional.silu(inner + drafter.calibration_in_bias)
        delta = drafter.calibration_out @ inner + drafter.calibration_out_bias
        logits.append(target.lm_head(hidden) + delta)
        if drafter.chains:
            bonus = int(logits[-1].argmax()) if forced is None else forced[len(logits)]
    return torch.stack(logits)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
