"""The part of a FlexDraft that one of several tensor-parallel ranks has."""

from typing import Any

import torch
from torch import Tensor

from vllm_budgetdraft.flexdraft.modeling import FlexDraft


@torch.no_grad()
def take_share(drafter: FlexDraft, rank: int, num_ranks: int) -> None:
    """Keeps the attention heads that vLLM's own layers have on a rank.

    What attention adds to hidden states is then a part of a sum over ranks, see
    ``FlexDraft.reduce``. The rest is small, and every rank has all of it.

    Args:
        num_ranks: divides the query heads; the KV heads, too, or it is a multiple of
            them: then ranks share them.
    """
    heads, kv_heads = drafter.num_heads, drafter.num_kv_heads
    count, kv_count = heads // num_ranks, max(1, kv_heads // num_ranks)
    first, kv_first = rank * count, rank * kv_heads // num_ranks
    layers: Any = drafter.layers
    for layer in layers:
        size = layer.head_dim
        keep = [
            torch.arange(begin * size, (begin + number) * size)
            for begin, number in (
                (first, count),
                (heads + kv_first, kv_count),
                (heads + kv_heads + kv_first, kv_count),
            )
        ]
        rows = torch.cat(keep).to(layer.qkv_weight.device)
        _cut(layer, "qkv_weight", layer.qkv_weight[rows])
        if layer.qkv_bias is not None:
            _cut(layer, "qkv_bias", layer.qkv_bias[rows])
        _cut(layer, "o_weight", layer.o_weight[:, rows[: count * size]])
        if layer.o_bias is not None and rank:
            layer.o_bias.zero_()  # it is added once
        layer.heads = (count, kv_count)
    drafter.num_heads, drafter.num_kv_heads = count, kv_count


def _cut(layer: torch.nn.Module, name: str, part: Tensor) -> None:
    setattr(layer, name, torch.nn.Parameter(part.contiguous(), requires_grad=False))
