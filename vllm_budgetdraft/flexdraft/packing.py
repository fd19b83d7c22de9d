"""FlexDraft's matrices in the form that a CPU reads fastest: ``drafter.packing``."""

from typing import Any

from vllm_budgetdraft.drafter.packing import multiply_packed, pack, packed_matrix
from vllm_budgetdraft.flexdraft.modeling import FlexDraft, TargetParts


def pack_matrices(drafter: FlexDraft, parts: TargetParts) -> int:
    """Packs what a drafter has in float32, and a copy of the target's output matrix.

    A drafter with a weight that is beyond the range of float16, or no number, is left
    alone, and so is the target's matrix.

    Returns:
        Bytes of that copy.
    """
    layers: Any = drafter.layers
    matrices = [(layer, name) for layer in layers for name in ("qkv", "o")]
    weights = [getattr(layer, f"{name}_weight") for layer, name in matrices]
    weights += [drafter.calibration_in, drafter.calibration_out, parts.head]
    if not all(weight.half().isfinite().all() for weight in weights):
        return 0
    for owner, name in matrices:
        pack(owner, f"{name}_weight", f"{name}_bias")
        owner.multiply = multiply_packed
    if drafter.calibration_rank:
        for name in ("calibration_in", "calibration_out"):
            pack(drafter, name, f"{name}_bias")
        drafter.multiply = multiply_packed
    parts.packed_head = packed_matrix(parts.head, None)
    return 2 * parts.head.numel()
