"""Mask tokens in vLLM's own pass of the target: through the MLPs of its last layers.

A layer of vLLM's has written its keys and values to the cache when its MLP runs, which
is all that mask tokens of that layer need. To a compiler such an MLP is one operation
that it does not look into, as attention is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from vllm_budgetdraft.flexdraft.parallel_round import ParallelRound

#: Of an attention layer of vLLM's, what runs in place of the MLP after it.
ATTRIBUTE = "budgetdraft_mlp"


@torch.library.custom_op("budgetdraft::mlp_with_masks", mutates_args=())
def mlp_with_masks(x: Tensor, layer_name: str) -> Tensor:
    """An MLP over tokens [T, hidden_size], and whatever goes along with them.

    Args:
        layer_name: of the attention before it, by which the engine that runs knows it:
            a compiled graph may be that of an engine before.
    """
    attention = get_forward_context().no_compile_layers[layer_name]
    out: Tensor = getattr(attention, ATTRIBUTE)(x)
    return out


@mlp_with_masks.register_fake
def _(x: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


def put_beside(
    layers: list[Any],
    masks: ParallelRound,
    begin: Callable[[int], None],
    report: Callable[[Exception], None],
) -> None:
    """Has mask tokens go along with what passes through layers of vLLM's.

    Args:
        layers: the last ones of the target.
        begin: called with T when a pass comes to the first of them; it may begin a
            round.
        report: called with what fails in a round, which costs the round alone.
    """
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn.attn, layer.mlp
        run = _with_masks(index, mlp.forward, masks, begin, report)
        setattr(attention, ATTRIBUTE, run)
        mlp.forward = partial(mlp_with_masks, layer_name=attention.layer_name)


def _with_masks(
    index: int,
    mlp: Callable[[Tensor], Tensor],
    masks: ParallelRound,
    begin: Callable[[int], None],
    report: Callable[[Exception], None],
) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        try:
            if index == 0:
                begin(len(x))
            if masks.is_on:
                return masks.pass_mlp(index, x, mlp)
        except Exception as error:
            masks.cancel()
            report(error)
        return mlp(x)

    return run
