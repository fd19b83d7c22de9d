"""How a number becomes one that pages store."""

import triton
import triton.language as tl

FP8_MAX: tl.constexpr = tl.constexpr(448.0)  # largest finite number of float8_e4m3fn


@triton.jit
def to_storage(x, scale, kv_head, exists, cells):
    """Rows of ``x`` [rows, dims] in the type that ``cells`` points to.

    ``scale`` points to what one unit of float8 stands for, by KV head, or is None;
    ``kv_head`` and ``exists`` are [rows].
    """
    if cells.dtype.element_ty == tl.float8e4nv:
        x = x.to(tl.float32)
        if scale is not None:
            x = x / tl.load(scale + kv_head, mask=exists, other=1.0)[:, None]
        x = tl.clamp(x, -FP8_MAX, FP8_MAX)
    return x.to(cells.dtype.element_ty)
