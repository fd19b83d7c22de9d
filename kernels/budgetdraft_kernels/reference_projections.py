"""``linear`` of ``reference``, and the norms of heads.

Letters in shapes: T tokens, K inputs and N outputs of a matrix, H query heads, G KV
heads, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetdraft_kernels.checks import check_linear

#: RMS norms of query heads and of key heads, [D] each, and their epsilon.
Norms = tuple[Tensor, Tensor, float] | None


def normed_heads(qkv: Tensor, num_kv_heads: int, norms: Norms) -> Tensor:
    """[..., H + 2 * G, D] with RMS norms over queries and keys, or as it is."""
    if norms is None:
        return qkv
    query_norm, key_norm, eps = norms
    num_heads = qkv.shape[-2] - 2 * num_kv_heads
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), -2)
    q = torch.rms_norm(q, query_norm.shape, query_norm, eps)
    k = torch.rms_norm(k, key_norm.shape, key_norm, eps)
    return torch.cat([q, k, v], -2)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """A product with a matrix, and the small operations before and after it.

    Args:
        x: [T, K], or any [..., K] where nothing is checked.
        weight: [N, K]; where ``gated`` [2 * N, K], first the rows of the gate.
        bias: [N] or [2 * N], as the weight.
        norm: [K], of an RMS norm over ``x`` that comes first; ``eps`` is its epsilon.
        gated: whether SiLU(gate) * up comes out.
        residual: [T, N], which is added in the end.
        validate: whether to check the arguments.

    Returns:
        [T, N].

    Raises:
        ValueError: sizes, strides or devices that do not fit.
        TypeError: a tensor of another type.
    """
    if validate:
        check_linear(x, weight, bias, norm, gated, residual)
    return linear_by(
        F.linear, x, weight, bias, norm=norm, eps=eps, gated=gated, residual=residual
    )


def linear_by(
    multiply: Callable[[Tensor, Any, Tensor | None], Tensor],
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``linear`` by a product of one's own, of weights in the form that it takes."""
    if norm is not None:
        x = torch.rms_norm(x, norm.shape, norm, eps)
    x = multiply(x, weight, bias)
    if gated:
        gate, up = x.chunk(2, -1)
        x = F.silu(gate) * up
    return x if residual is None else residual + x
