"""Triton's interpreter, mended where it computes something else than a GPU does.

It cuts numbers off where it converts them to bfloat16 and float8, and multiplies the
bits of bfloat16 matrices as if they were integers.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
#: What holds the bits of those that NumPy lacks.
CARRIERS = {tl.bfloat16: torch.int16, tl.float8e4nv: torch.uint8}


def to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data)).view(TORCH_TYPES[dtype])


def convert(
    data: np.ndarray, dtype: tl.dtype, new_dtype: tl.dtype, rounding_mode: object
) -> np.ndarray:
    """In the place of ``interpreter._convert_float``: rounds to the nearest."""
    converted = to_torch(data, dtype).to(TORCH_TYPES[new_dtype])
    if new_dtype in CARRIERS:
        converted = converted.view(CARRIERS[new_dtype])
    bits = np.dtype(f"uint{new_dtype.primitive_bitwidth}")
    return converted.numpy().view(bits)


def mend() -> None:
    """Idempotent."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot
    if original.__name__ == "create_dot_of_numbers":
        return

    def create_dot_of_numbers(self, a, b, *rest):
        a, b = (
            interpreter.TensorHandle(
                to_torch(x.data, x.dtype).float().numpy(), tl.float32
            )
            if x.dtype.scalar in CARRIERS
            else x
            for x in (a, b)
        )
        return original(self, a, b, *rest)

    builder.create_dot = create_dot_of_numbers
    interpreter._convert_float = convert
