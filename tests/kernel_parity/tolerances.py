"""How far a kernel may be from its definition, evaluated in float32."""

import torch
from torch import Tensor

#: Relative and absolute, by the type that a kernel computes in or stores.
TOLERANCES = {
    # A few hundred terms of order one, summed in another order.
    torch.float32: (2e-6, 2e-6),
    # Half a step of 2 ** -10 when weights are rounded, and again for the result.
    torch.float16: (1e-3, 5e-4),
    # As float16, with steps of 2 ** -7.
    torch.bfloat16: (8e-3, 4e-3),
    # One step of 2 ** -3, for what lies between two numbers may be rounded to either.
    torch.float8_e4m3fn: (0.125, 2**-9),
}
#: How many times that, where rotated keys are rounded before they meet the queries.
ROTATED = 4


def assert_close(
    name: str, found: Tensor, expected: Tensor, dtype: torch.dtype, times: float = 1
) -> None:
    """Finite, of the same shape, and as near as ``dtype`` allows."""
    found, expected = found.float(), expected.float()
    missing = (~found.isfinite()).nonzero()
    assert not len(missing), f"{name} is not finite at {missing[:5].tolist()}"
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(
        found,
        expected,
        rtol=times * rtol,
        atol=times * atol,
        msg=lambda text: f"{name}: {text}",
    )
