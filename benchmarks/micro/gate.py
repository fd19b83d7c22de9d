"""What does not agree with the reference is not timed."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Largest norm of the error, as a share of the result's: rounding of operands.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
HIGHER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}


class RedGateError(Exception):
    """A result is not what the reference computes."""


def fused_can_run(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``."""
    difference = found.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def require_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The relative error.

    Raises:
        RedGateError: it is more than rounding of ``dtype`` explains, or not a number.
    """
    error = relative_error(found, expected)
    if not error <= TOLERANCE[dtype]:
        raise RedGateError(f"relative error {error:.3g} exceeds {TOLERANCE[dtype]:g}")
    return error


def require_agreement(
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    dtype: torch.dtype,
    **options: Any,
) -> None:
    """Both forms on copies of ``inputs``: what they return, and what they write.

    Tokens are not compared: of two equally likely ones either may be picked, and then
    the probabilities, which are compared, are the same.

    Raises:
        RedGateError: they differ.
    """
    pairs = zip(
        _results(fused, inputs, options),
        _results(reference, inputs, options),
        strict=True,
    )
    for found, expected in pairs:
        require_close(found, expected, dtype)


def _results(
    operation: Callable[..., Any], inputs: Mapping[str, Any], options: dict[str, Any]
) -> list[Tensor]:
    copies = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    returned = operation(**copies, **options)
    returned = returned if isinstance(returned, tuple) else (returned,)
    tensors = [*returned, *copies.values()]
    return [x for x in tensors if isinstance(x, Tensor) and x.is_floating_point()]
