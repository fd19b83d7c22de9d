"""The kept part of a prompt in its cells, and every other byte as it was."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import fused, reference

FP8, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    num_tokens: int = 100
    num_kept: int = 63
    layers: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    key_type: torch.dtype | None = None
    value_type: torch.dtype | None = None
    scales: bool = False
    heads_first: bool = False

    @property
    def num_pages(self) -> int:
        return -(-self.num_kept // self.page_size) + 2


CASES = {
    "plain": Case(),
    "one_of_one": Case(1, 1),
    "nothing": Case(10, 0),
    "as_many_as_a_program": Case(64, 32),
    "everything": Case(100, 100, page_size=24),
    "odd_sizes": Case(33, 33, layers=3, kv_heads=3, head_dim=10, page_size=7),
    "pages_of_1": Case(63, 9, layers=1, kv_heads=1, head_dim=1, page_size=1),
    "head_dim_80_bf16": Case(head_dim=80, dtype=BF16),
    "head_dim_96_fp16": Case(head_dim=96, dtype=FP16, kv_heads=5),
    "head_dim_256": Case(40, 33, head_dim=256, page_size=64),
    "fp8": Case(key_type=FP8, value_type=FP8),
    "fp8_scaled": Case(key_type=FP8, value_type=FP8, scales=True, kv_heads=3),
    "fp8_of_bf16": Case(dtype=BF16, key_type=FP8, value_type=FP8, scales=True),
    "fp8_of_fp16": Case(dtype=FP16, key_type=FP8, value_type=FP8, scales=True),
    "fp8_keys_only": Case(dtype=BF16, key_type=FP8, scales=True),
    "fp8_values_only": Case(value_type=FP8, scales=True),
    "heads_first": Case(heads_first=True, kv_heads=3),
}


def make(case: Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)

    def prompt() -> Tensor:
        shape = (case.layers, case.num_tokens, case.kv_heads, case.head_dim)
        x = (100 * torch.randn(shape)).to(device, case.dtype)
        if case.heads_first:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x

    def kept() -> Tensor:
        return torch.randperm(case.num_tokens)[: case.num_kept].sort().values

    heads = [kept() for _ in range(case.layers * case.kv_heads)]
    arguments = {
        "keys": prompt(),
        "values": prompt(),
        "kept": torch.stack(heads)
        .view(case.layers, case.kv_heads, case.num_kept)
        .to(device),
        "cells": torch.randperm(case.num_pages * case.page_size)[: case.num_kept].to(
            device
        ),
    }
    if case.scales:
        # Powers of two, by which a GPU divides exactly too.
        scales = 2.0 ** torch.randint(-4, 4, (2, case.layers, case.kv_heads))
        arguments["key_scale"], arguments["value_scale"] = scales.to(device)
    return arguments


def random_pages(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One layer more than the pages on either side; every bit at random."""
    shape = (
        case.layers + 2,
        case.num_pages,
        case.page_size,
        case.kv_heads,
        case.head_dim,
    )
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,)).byte().view(dtype).view(shape).to(device)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_definition_in_every_byte(case, device):
    arguments = make(case, device)
    types = (case.key_type or case.dtype, case.value_type or case.dtype)
    found = [random_pages(case, dtype, device) for dtype in types]
    expected = [x.clone() for x in found]
    for module, (keys, values) in ((fused, found), (reference, expected)):
        module.page_compaction(
            key_pages=keys[1:-1], value_pages=values[1:-1], **arguments
        )
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))


def test_every_byte_outside_the_named_cells_stays(device):
    case = Case()
    arguments = make(case, device)
    pages = [random_pages(case, case.dtype, device) for _ in range(2)]
    before = [x.clone() for x in pages]
    fused.page_compaction(
        key_pages=pages[0][1:-1], value_pages=pages[1][1:-1], **arguments
    )
    for after, untouched in zip(pages, before, strict=True):
        same = after.view(torch.int32) == untouched.view(torch.int32)
        changed = (~same).flatten(3).any(-1).flatten(1)
        wanted = torch.zeros_like(changed)
        wanted[1:-1, arguments["cells"]] = True
        assert torch.equal(changed, wanted)


def test_positions_and_cells_out_of_range_are_neither_read_nor_written(device):
    case = Case(num_kept=8)
    arguments = make(case, device)
    num_cells = case.num_pages * case.page_size
    arguments["kept"][..., :3] = torch.tensor(
        [-1, case.num_tokens, 2**40], device=device
    )
    arguments["cells"][:6] = torch.tensor(
        [1, 2, 3, -1, num_cells, 2**40], device=device
    )
    arguments["cells"][6:] = torch.tensor([4, 5], device=device)
    pages = [random_pages(case, case.dtype, device) for _ in range(2)]
    before = [x.clone() for x in pages]
    fused.page_compaction(
        key_pages=pages[0][1:-1],
        value_pages=pages[1][1:-1],
        validate=False,
        **arguments,
    )
    for after, untouched in zip(pages, before, strict=True):
        same = after.view(torch.int32) == untouched.view(torch.int32)
        changed = (~same).flatten(3).any(-1).flatten(1)
        wanted = torch.zeros_like(changed)
        wanted[1:-1, 4:6] = True
        assert torch.equal(changed, wanted)
