"""Matrices in the form that a CPU reads fastest.

A draft token takes one pass over all weights, so that a CPU drafts as fast as it reads
memory. FBGEMM, which PyTorch brings on x86, keeps matrices in float16, in the order in
which it reads them, and multiplies and sums in float32. Hidden states and the cache
stay in float32.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from budgetdraft_kernels.reference_projections import linear_by
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.drafter.modeling import Drafter

MATRICES = ("qkv", "o", "gate_up", "down")


def can_pack() -> bool:
    """Whether this build of PyTorch, on this CPU, has packed matrices."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def pack_matrices(drafter: Drafter) -> None:
    """Packs the matrices of a drafter on a CPU, in float32, for drafting alone.

    Its plain twin is ``F.linear`` over matrices rounded to float16. The embedding stays
    as it is, for its rows are looked up. A drafter with a weight that is beyond the
    range of float16, or no number, is left alone.
    """
    if not all(weight.half().isfinite().all() for weight in _matrices(drafter)):
        return
    _replace(drafter, "lm_head", packed_matrix(drafter.head, None))
    if isinstance(drafter, FeatureDrafter):
        _replace(drafter, "fc_weight", packed_matrix(drafter.fc_weight, None))
    for layer in drafter.layers:
        for name in MATRICES:
            weight, bias = f"{name}_weight", f"{name}_bias"
            pack(layer, weight, bias)
    drafter.linear = partial(linear_by, multiply_packed)
    drafter.multiply_by(drafter.linear)
    drafter.is_packed = True


def weight_bytes(
    config: PretrainedConfig,
    dtype: torch.dtype,
    is_packed: bool,
    draft_ids: Tensor | None = None,
    shares_embedding: bool = False,
) -> int:
    """What a drafter's weights take in memory, packed or in ``dtype``.

    Args:
        config: of a decoder, or of an EAGLE-3 head.
        draft_ids: see ``Drafter.keep_rows``.
        shares_embedding: whether that is the target's.
    """
    is_head = hasattr(config, "num_aux_layers")
    with torch.device("meta"):
        drafter = FeatureDrafter(config, 1) if is_head else Drafter(config, 1)
        if draft_ids is not None:
            drafter.keep_rows(draft_ids.to("meta"))
        if shares_embedding:
            drafter.embedding = nn.Parameter(torch.empty(0))
    parameters = {id(p): p.numel() * dtype.itemsize for p in drafter.parameters()}
    if not is_packed:
        return sum(parameters.values())
    packed = 0
    for weight in _matrices(drafter):
        packed += weight.numel() * torch.half.itemsize
        if weight is not drafter.embedding:
            del parameters[id(weight)]
    return sum(parameters.values()) + packed


def _matrices(drafter: Drafter) -> list[Tensor]:
    """All that hidden states are multiplied with."""
    layers = (layer.parameters() for layer in drafter.layers)
    own = [drafter.fc_weight] if isinstance(drafter, FeatureDrafter) else []
    return [drafter.head, *own, *(p for each in layers for p in each if p.ndim == 2)]


def packed_matrix(weight: Tensor, bias: Tensor | None) -> Any:
    """A matrix and its bias as ``multiply_packed`` takes them."""
    return torch.ops.quantized.linear_prepack_fp16(weight, bias)


def multiply_packed(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a packed matrix, which has its bias in it."""
    assert bias is None, "the bias is packed"
    product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return product


def pack(owner: nn.Module, weight: str, bias: str) -> None:
    """Packs a matrix and its bias, attributes of ``owner``, for ``multiply_packed``."""
    packed = packed_matrix(getattr(owner, weight), getattr(owner, bias))
    _replace(owner, weight, packed)
    _replace(owner, bias, None)


def _replace(module: nn.Module, name: str, value: Any) -> None:
    """Puts what is no parameter in a parameter's place."""
    delattr(module, name)
    setattr(module, name, value)
