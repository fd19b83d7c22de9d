"""The kept keys and values of a prompt, moved into pages in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from budgetdraft_kernels import launch_settings
from budgetdraft_kernels.checks import check_compaction
from budgetdraft_kernels.storage import to_storage


@triton.jit(do_not_specialize=["num_tokens", "num_kept", "num_cells"])
def compaction_kernel(
    key_cells,  # [L, num_cells, G, D]
    value_cells,
    keys,
    values,
    kept,  # [L, G, num_kept]
    cells,
    key_scale,
    value_scale,
    num_tokens,
    num_kept,
    num_cells,
    layer_stride,
    token_stride,
    head_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
):
    kv_head = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    order = tl.program_id(0) * KEPT_BLOCK + tl.arange(0, KEPT_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    exists = order < num_kept
    row = layer * NUM_KV_HEADS + kv_head
    position = tl.load(kept + row * num_kept + order, mask=exists, other=0)
    cell = tl.load(cells + order, mask=exists, other=0)
    exists &= (position >= 0) & (position < num_tokens)
    exists &= (cell >= 0) & (cell < num_cells)
    mask = exists[:, None] & (dim < HEAD_DIM)[None, :]

    source = layer * layer_stride + position * token_stride + kv_head * head_stride
    source = source[:, None] + dim[None, :]
    cell_row = (layer * num_cells + cell) * NUM_KV_HEADS + kv_head
    lanes = cell_row[:, None] * HEAD_DIM + dim[None, :]
    heads = tl.zeros([KEPT_BLOCK], tl.int64) + row
    k = tl.load(keys + source, mask=mask, other=0.0)
    stored = to_storage(k, key_scale, heads, exists, key_cells)
    tl.store(key_cells + lanes, stored, mask=mask)
    v = tl.load(values + source, mask=mask, other=0.0)
    stored = to_storage(v, value_scale, heads, exists, value_cells)
    tl.store(value_cells + lanes, stored, mask=mask)


def page_compaction(
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    cells: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    validate: bool = True,
) -> None:
    """See ``reference.page_compaction``."""
    if validate:
        check_compaction(
            keys, values, kept, key_pages, value_pages, cells, key_scale, value_scale
        )
    num_layers, num_kv_heads, num_kept = kept.shape
    _, num_pages, page_size, _, head_dim = key_pages.shape
    if not num_kept:
        return
    block = launch_settings.settings_of(keys.device).compaction_rows
    compaction_kernel[(triton.cdiv(num_kept, block), num_kv_heads, num_layers)](
        key_pages,
        value_pages,
        keys,
        values,
        kept,
        cells,
        key_scale,
        value_scale,
        keys.shape[1],
        num_kept,
        num_pages * page_size,
        *keys.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        KEPT_BLOCK=block,
    )
