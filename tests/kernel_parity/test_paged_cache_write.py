"""Rotation and the write to the pages, which change nothing but the named cells."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import fused, reference
from tests.kernel_parity.tolerances import assert_close

FP8, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
NUM_PAGES = 6


@dataclass(frozen=True)
class Case:
    num_tokens: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    key_type: torch.dtype | None = None
    value_type: torch.dtype | None = None
    rotary_type: torch.dtype = torch.float32
    scales: bool = False
    rotate_keys: bool = True
    norms: bool = False
    qkv_of_more: bool = False


CASES = {
    "plain": Case(),
    "one_token": Case(1),
    "no_tokens": Case(0),
    "63_tokens": Case(63, page_size=24, head_dim=32),
    "odd_heads": Case(heads=7, kv_heads=3, head_dim=10, page_size=7),
    "one_kv_head": Case(heads=1, kv_heads=1, head_dim=2, page_size=1),
    "more_heads_than_a_program": Case(heads=24, kv_heads=6, head_dim=32),
    "head_dim_80": Case(head_dim=80),
    "head_dim_96_fp16": Case(head_dim=96, dtype=FP16, rotary_type=FP16),
    "head_dim_128_bf16": Case(head_dim=128, dtype=BF16, page_size=8),
    "head_dim_256_bf16": Case(head_dim=256, dtype=BF16, rotary_type=BF16),
    "keys_as_they_are": Case(rotate_keys=False),
    "keys_as_they_are_bf16": Case(rotate_keys=False, dtype=BF16),
    "fp8": Case(key_type=FP8, value_type=FP8),
    "fp8_scaled": Case(key_type=FP8, value_type=FP8, scales=True, kv_heads=3, heads=3),
    "fp8_of_bf16": Case(dtype=BF16, key_type=FP8, value_type=FP8, scales=True),
    "fp8_of_fp16": Case(
        dtype=FP16, key_type=FP8, value_type=FP8, scales=True, rotate_keys=False
    ),
    "fp8_keys_only": Case(dtype=BF16, key_type=FP8, scales=True),
    "fp8_values_only": Case(value_type=FP8, scales=True),
    "norms": Case(norms=True),
    "norms_of_odd_heads": Case(heads=7, kv_heads=3, head_dim=10, norms=True),
    "norms_of_keys_as_they_are": Case(head_dim=80, norms=True, rotate_keys=False),
    "norms_bf16": Case(heads=24, dtype=BF16, head_dim=128, norms=True),
    "norms_fp16_stored_as_fp8": Case(
        dtype=FP16, key_type=FP8, value_type=FP8, scales=True, norms=True
    ),
    "strided": Case(qkv_of_more=True, kv_heads=3, head_dim=80),
}


def make(case: Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    all_heads = case.heads + 2 * case.kv_heads
    qkv = torch.randn(case.num_tokens, all_heads, case.head_dim)
    if case.qkv_of_more:
        more = torch.full((case.num_tokens, all_heads + 3, case.head_dim), torch.nan)
        more[:, :all_heads] = qkv
        qkv = more[:, :all_heads]
    half = 6 * torch.randn(case.num_tokens, case.head_dim // 2)
    cells = torch.randperm(NUM_PAGES * case.page_size)[: case.num_tokens]
    arguments = {
        "qkv": qkv.to(device, case.dtype),
        "cos": torch.cat([half.cos(), half.cos()], -1).to(device, case.rotary_type),
        "sin": torch.cat([-half.sin(), half.sin()], -1).to(device, case.rotary_type),
        "cells": cells.to(device),
        "rotate_keys": case.rotate_keys,
    }
    if case.norms:
        weights = 1 + torch.randn(2, case.head_dim).to(device, case.dtype)
        arguments["norms"] = (weights[0], weights[1], 1e-3)
    if case.scales:
        arguments["key_scale"] = torch.rand(case.kv_heads).to(device) + 0.01
        arguments["value_scale"] = torch.rand(case.kv_heads).to(device) + 0.01
    return arguments


def random_pool(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One page more than the pool on either side; every bit at random."""
    shape = (NUM_PAGES + 2, case.page_size, case.kv_heads, case.head_dim)
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,)).byte().view(dtype).view(shape).to(device)


def rows(pool: Tensor) -> Tensor:
    """Bytes of each cell."""
    return pool.flatten(0, 1).flatten(1).view(torch.uint8)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_definition_and_writes_nothing_else(case, device):
    arguments = make(case, device)
    types = (case.key_type or case.dtype, case.value_type or case.dtype)
    around = [random_pool(case, dtype, device) for dtype in types]
    expected = [x.clone() for x in around]
    queries = fused.paged_cache_write(
        key_pages=around[0][1:-1], value_pages=around[1][1:-1], **arguments
    )
    # Angles of half precision would have the definition round in between.
    arguments |= {name: arguments[name].float() for name in ("cos", "sin")}
    expected_queries = reference.paged_cache_write(
        key_pages=expected[0][1:-1], value_pages=expected[1][1:-1], **arguments
    )

    assert queries.dtype == case.dtype
    assert_close("queries", queries, expected_queries, case.dtype)
    cells = arguments["cells"] + case.page_size
    named = torch.zeros(len(rows(around[0])), dtype=torch.bool, device=device)
    named[cells] = True
    for name, found, wanted, dtype in zip(
        ("keys", "values"), around, expected, types, strict=True
    ):
        found, wanted = rows(found), rows(wanted)
        assert_close(name, found[named].view(dtype), wanted[named].view(dtype), dtype)
        assert torch.equal(found[~named], wanted[~named])


def written_as_fp8(module, numbers: list[float], scale: float, device) -> Tensor:
    """What float8 pages hold of ``numbers``, as keys and as values."""
    x = torch.tensor([numbers, numbers, numbers], device=device)[None]
    head_dim = len(numbers)
    angles = torch.zeros(1, head_dim, device=device)
    pages = torch.zeros(2, 1, 1, 1, head_dim, device=device).to(FP8)
    scales = torch.tensor([scale], device=device)
    module.paged_cache_write(
        x,
        angles + 1,
        angles,
        pages[0],
        pages[1],
        torch.tensor([0], device=device),
        key_scale=scales,
        value_scale=scales,
    )
    return pages.view(2, head_dim).float()


@pytest.mark.parametrize("module", [reference, fused], ids=["reference", "fused"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_float8_pages_saturate_and_round_to_the_nearest(module, scale, device):
    numbers = [1e6, -1e6, 449.0, 448.0, -3e38, 1.0625, 1.1875, 0.0, 1.07, 2e-3]
    # Ties go to the even neighbour; the last is one step above zero.
    nearest = [448, -448, 448, 448, -448, 1.0, 1.25, 0.0, 1.125, 2**-9]
    found = written_as_fp8(module, [x * scale for x in numbers], scale, device)
    assert found.tolist() == [nearest, nearest]


def test_a_cell_outside_the_pages_is_not_written(device):
    case = Case(6)
    arguments = make(case, device)
    num_cells = NUM_PAGES * case.page_size
    arguments["cells"] = torch.tensor(
        [-1, num_cells, 3, num_cells + case.page_size - 1, -case.page_size, 2**40],
        device=device,
    )
    around = [random_pool(case, torch.float32, device) for _ in range(2)]
    before = [x.clone() for x in around]
    queries = fused.paged_cache_write(
        key_pages=around[0][1:-1],
        value_pages=around[1][1:-1],
        validate=False,
        **arguments,
    )
    assert queries.isfinite().all()
    for after, untouched in zip(around, before, strict=True):
        changed = (rows(after) != rows(untouched)).any(-1).nonzero()
        assert changed.tolist() == [[3 + case.page_size]]
