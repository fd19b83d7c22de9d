"""Products with a matrix, and what is done before and after them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from budgetdraft_kernels import fused, launch_settings, reference
from tests.kernel_parity.tolerances import assert_close

BF16, FP16 = torch.bfloat16, torch.float16
EVERYTHING = {"bias": True, "norm": True, "gated": True, "residual": True}


@dataclass(frozen=True)
class Case:
    num_rows: int = 3
    num_inputs: int = 48
    num_outputs: int = 71
    dtype: torch.dtype = torch.float32
    bias: bool = False
    norm: bool = False
    gated: bool = False
    residual: bool = False
    largest: float = 1.0


CASES = {
    "plain": Case(),
    "bias": Case(bias=True),
    "norm": Case(norm=True),
    "gated": Case(gated=True),
    "residual": Case(residual=True),
    "everything": Case(**EVERYTHING),
    "one_row": Case(1, **EVERYTHING),
    "no_rows": Case(0, **EVERYTHING),
    "17_rows": Case(17, 100, 64, **EVERYTHING),
    "63_rows": Case(63, 63, 16, **EVERYTHING),
    "64_rows": Case(64, 64, 80, **EVERYTHING),
    "more_rows_than_a_program": Case(65, 64, 80, **EVERYTHING),
    "one_input": Case(num_inputs=1, num_outputs=1, bias=True, residual=True),
    "several_tiles": Case(5, 300, 33, **EVERYTHING),
    "bf16": Case(5, 300, 33, BF16, **EVERYTHING),
    "bf16_plain": Case(17, 128, 128, BF16),
    "fp16": Case(5, 300, 33, FP16, **EVERYTHING),
    # The sum of their squares is far beyond float16.
    "fp16_of_large_rows": Case(5, 300, 33, FP16, norm=True, largest=1e4),
}


def make(case: Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    rows = case.num_outputs * (2 if case.gated else 1)
    arguments: dict[str, Any] = {
        "x": torch.randn(case.num_rows, case.num_inputs) * case.largest,
        "weight": torch.randn(rows, case.num_inputs) * case.num_inputs**-0.5,
    }
    if case.bias:
        arguments["bias"] = torch.randn(rows)
    if case.norm:
        arguments["norm"] = 1 + 0.3 * torch.randn(case.num_inputs)
    if case.residual:
        arguments["residual"] = torch.randn(case.num_rows, case.num_outputs)
    arguments = {name: x.to(device, case.dtype) for name, x in arguments.items()}
    return arguments | {"gated": case.gated, "eps": 1e-3}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_definition(case, device):
    arguments = make(case, device)
    out = fused.linear(**arguments)
    assert out.dtype == case.dtype
    exact = {
        name: x.float() if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }
    expected = reference.linear(**exact)
    # Normed rows are rounded, and where PyTorch multiplies each step's result is.
    assert_close("out", out, expected, case.dtype, times=4)


def test_more_rows_than_a_program_has_are_left_to_pytorch(device):
    most = launch_settings.settings_of(device).linear_rows
    arguments = make(Case(most + 1, dtype=BF16, **EVERYTHING), device)
    assert torch.equal(fused.linear(**arguments), reference.linear(**arguments))


def test_a_row_does_not_depend_on_the_others(device):
    """Whatever another request's row holds, even NaN."""
    arguments = make(Case(20, **EVERYTHING), device)
    expected = fused.linear(**arguments)
    arguments["x"][3:] = torch.nan
    out = fused.linear(**arguments)
    assert torch.equal(out[:3], expected[:3])
    assert out[3:].isnan().all()


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


VALID = {
    "x": zeros(3, 8),
    "weight": zeros(10, 8),
    "bias": zeros(10),
    "norm": zeros(8),
    "gated": True,
    "residual": zeros(3, 5),
}
WRONG = [
    (ValueError, {"x": zeros(3, 4, 8)}, r"x has shape \[3, 4, 8\], not \[T, K\]"),
    (ValueError, {"weight": zeros(10, 9)}, r"weight .*\[10, 9\], not .*K=8"),
    (ValueError, {"weight": zeros(9, 8)}, r"weight has 9 rows; gate and up"),
    (ValueError, {"bias": zeros(5)}, r"bias has shape \[5\], not \[10\]"),
    (ValueError, {"norm": zeros(5)}, r"norm has shape \[5\], not \[K=8\]"),
    (ValueError, {"residual": zeros(3, 10)}, r"residual .*10\], not \[T=3, 5\]"),
    (ValueError, {"gated": False}, r"residual .*\[3, 5\], not \[T=3, 10\]"),
    (ValueError, {"x": zeros(3, 9)[:, :8]}, r"x of .*\(9, 1\), it is not contiguous"),
    (ValueError, {"weight": zeros(8, 10).T}, r"weight .*, it is not contiguous"),
    (ValueError, {"norm": zeros(8).to("meta")}, r"several devices.*meta"),
    (TypeError, {"x": zeros(3, 8).double()}, r"x is torch\.float64"),
    (TypeError, {"weight": zeros(10, 8).half()}, r"weight .*16, not torch\.float32"),
    (TypeError, {"residual": zeros(3, 5).half()}, r"residual is torch\.float16"),
]


@pytest.mark.parametrize("module", [reference, fused], ids=["reference", "fused"])
@pytest.mark.parametrize(("error", "change", "message"), WRONG)
def test_wrong_arguments_are_refused(error, change, message, module):
    with pytest.raises(error, match=message):
        module.linear(**{**VALID, **change})
