"""Triton's interpreter, mended where it computes something else than a GPU does.

It cuts numbers off where it converts them to bfloat16 and float8, multiplies the bits
of bfloat16 matrices as if they were integers, fails at the largest of only NaN and at
masks that were computed with numbers, and lacks log1p. It also patches the
language again at every call inside a kernel, which is a quarter of its time; once per
launch suffices.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language.extra import libdevice
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


def argmax(data: np.ndarray, axis: int, keepdims: bool) -> np.ndarray:
    """Where only NaN is above -inf the last, for no comparison keeps a GPU from it."""
    if not np.isnan(data).any() or (data > -np.inf).any():
        return np.nanargmax(data, axis=axis, keepdims=keepdims)
    first = np.argmax(data, axis=axis, keepdims=keepdims)
    return np.full_like(first, data.shape[axis] - 1)


def as_bits(mask: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(mask.data.astype(bool), tl.int1)


def log1p(x: tl.tensor) -> tl.tensor:
    handle = interpreter.TensorHandle(np.log1p(x.handle.data), x.handle.dtype)
    return tl.tensor(handle, x.type)


def mend() -> None:
    """Idempotent."""
    if interpreter._convert_float is convert:
        return
    interpreter._convert_float = convert

    builder, reduction = interpreter.InterpreterBuilder, interpreter.ReduceOps
    create_dot, min_max = builder.create_dot, reduction.min_max
    load, store = builder.create_masked_load, builder.create_masked_store

    def load_with_bits(self, pointers, mask, *rest):
        return load(self, pointers, as_bits(mask), *rest)

    def store_with_bits(self, pointers, value, mask, *rest):
        return store(self, pointers, value, as_bits(mask), *rest)

    def create_dot_of_numbers(self, a, b, *rest):
        a, b = (
            interpreter.TensorHandle(
                to_torch(x.data, x.dtype).float().numpy(), tl.float32
            )
            if x.dtype.scalar in CARRIERS
            else x
            for x in (a, b)
        )
        return create_dot(self, a, b, *rest)

    def min_max_of_any(self, input, val_reduce_op, idx_reduce_op=None):
        if idx_reduce_op is np.nanargmax:
            idx_reduce_op = argmax
        return min_max(self, input, val_reduce_op, idx_reduce_op)

    patch_language = interpreter._patch_lang
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def call_within_a_kernel(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = lambda kernel: patch_language(language)
    interpreter.InterpretedFunction.__call__ = call_within_a_kernel
    builder.create_dot = create_dot_of_numbers
    libdevice.log1p = log1p
    builder.create_masked_load = load_with_bits
    builder.create_masked_store = store_with_bits
    reduction.min_max = min_max_of_any


def divide_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotients of float32 come out up to two units in the last place off.

    Triton divides by ``div.full.f32``, which PTX allows such an error; and a quotient
    that an assembler fuses with what follows is not rounded at all. Which of these it
    is differs between kernels, so the error differs from call to call here.
    """
    generator = np.random.default_rng(0)

    def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        quotient = np.divide(x, y)
        if quotient.dtype != np.float32:
            return quotient
        units = generator.integers(-2, 3, quotient.shape)
        return quotient * (1 + units * 2.0**-23).astype(np.float32)

    def create_fdiv(self, x, y):
        return self.binary_op(x, y, divide)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", create_fdiv)
