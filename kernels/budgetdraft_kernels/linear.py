"""A product of a few rows with a matrix, and the small operations around it.

A draft step reads every weight once, for a handful of tokens: it takes as long as its
launches where these are many. Here a program has a few outputs of all rows, and finds
the norm of the rows by itself, which lie in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from budgetdraft_kernels import launch_settings
from budgetdraft_kernels.checks import check_linear
from budgetdraft_kernels.reference_projections import linear as reference_linear

#: Rows per program: tensor cores take 16 at least.
MIN_ROWS = 16
#: Of each row of the matrix that a program holds at a time, and how often it does.
TILE_BYTES, STAGES = 256, 3


@triton.jit
def loaded_tile(x, row, exists, column, COLUMNS: tl.constexpr):
    """[rows, columns] of [..., COLUMNS]; 0 beyond its ends."""
    lanes = x + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    return tl.load(lanes, mask=exists[:, None] & (column < COLUMNS)[None, :], other=0.0)


# What changes from call to call must not ask for another compilation.
@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    out,  # [T, N]
    x,  # [T, K]
    weight,  # [N, K], or [2 * N, K] where gated
    bias,  # [N] or [2 * N], or None
    norm,  # [K], or None
    residual,  # [T, N], or None
    eps,
    num_rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GATED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    OUTPUT_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.arange(0, ROW_BLOCK)
    row_exists = row < num_rows
    output = tl.program_id(0) * OUTPUT_BLOCK + tl.arange(0, OUTPUT_BLOCK)
    output_exists = output < OUTPUTS
    lane = tl.arange(0, TILE)

    if norm is not None:
        squares = tl.zeros([ROW_BLOCK], tl.float32)
        for first in tl.range(0, INPUTS, TILE, num_stages=STAGES):
            h = loaded_tile(x, row, row_exists, first + lane, INPUTS).to(tl.float32)
            squares += tl.sum(h * h, 1)
        scale = tl.rsqrt(squares / INPUTS + eps)

    total = tl.zeros([ROW_BLOCK, OUTPUT_BLOCK], tl.float32)
    up = tl.zeros([ROW_BLOCK, OUTPUT_BLOCK], tl.float32)
    for first in tl.range(0, INPUTS, TILE, num_stages=STAGES):
        column = first + lane
        h = loaded_tile(x, row, row_exists, column, INPUTS)
        if norm is not None:
            g = tl.load(norm + column, mask=column < INPUTS, other=0.0).to(tl.float32)
            h = (h.to(tl.float32) * scale[:, None] * g[None, :]).to(h.dtype)
        w = loaded_tile(weight, output, output_exists, column, INPUTS)
        total = tl.dot(h, tl.trans(w), total, input_precision="ieee")
        if GATED:
            w = loaded_tile(weight, OUTPUTS + output, output_exists, column, INPUTS)
            up = tl.dot(h, tl.trans(w), up, input_precision="ieee")

    if bias is not None:
        b = tl.load(bias + output, mask=output_exists, other=0.0)
        total += b.to(tl.float32)[None, :]
        if GATED:
            b = tl.load(bias + OUTPUTS + output, mask=output_exists, other=0.0)
            up += b.to(tl.float32)[None, :]
    if GATED:
        total = total * tl.sigmoid(total) * up
    lanes = row[:, None] * OUTPUTS + output[None, :]
    mask = row_exists[:, None] & output_exists[None, :]
    if residual is not None:
        total += tl.load(residual + lanes, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + lanes, total.to(out.dtype.element_ty), mask=mask)


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
    """See ``reference.linear``; many rows, as prompts have, are left to PyTorch."""
    if validate:
        check_linear(x, weight, bias, norm, gated, residual)
    num_rows, num_inputs = x.shape
    settings = launch_settings.settings_of(x.device)
    if num_rows > settings.linear_rows:
        return reference_linear(
            x,
            weight,
            bias,
            norm=norm,
            eps=eps,
            gated=gated,
            residual=residual,
            validate=False,
        )
    num_outputs = len(weight) // 2 if gated else len(weight)
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    block, tile = settings.linear_outputs, TILE_BYTES // x.element_size()
    if num_rows:
        linear_kernel[(triton.cdiv(num_outputs, block),)](
            out,
            x,
            weight,
            bias,
            norm,
            residual,
            eps,
            num_rows,
            INPUTS=num_inputs,
            OUTPUTS=num_outputs,
            GATED=gated,
            ROW_BLOCK=MIN_ROWS if num_rows <= MIN_ROWS else settings.linear_rows,
            OUTPUT_BLOCK=block,
            TILE=tile,
            STAGES=STAGES,
            num_warps=launch_settings.warps(tile, x.element_size()),
        )
    return out
