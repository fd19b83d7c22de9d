"""What compute capability 9.0 would run, compiled ahead of time and inspected."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends import backends

from budgetdraft_kernels import fused, launch_settings
from budgetdraft_kernels.paged_sparse_attention import MAX_TOKENS
from tests.support.compilation import ATTENTION, CASES, DECODING, spills_in_loops

pytestmark = pytest.mark.skipif(
    "nvidia" not in backends, reason="this build of Triton has no NVIDIA backend"
)

ROOT = Path(__file__).resolve().parents[2]
#: Of a multiprocessor of capability 9.0; a program takes 1 KiB more than it asks for.
REGISTERS, SHARED_BYTES, RESERVED_BYTES = 65_536, 227 * 1024, 1024
#: A few words that nothing needs before the end of a loop: assemblers put them aside
#: there for one more program at a time.
STACK_BYTES = 32
#: So that one program computes while another waits for memory.
PROGRAMS = 2
SETTINGS = launch_settings.SETTINGS[9, 0]

Kernel = dict[str, Any]


@pytest.fixture(scope="module")
def report() -> dict[str, list[Kernel]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.compilation", "90"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


def attention_of(kernels: list[Kernel]) -> Kernel:
    (found,) = [k for k in kernels if k["kernel"] == "attention_kernel"]
    return found


def test_every_kernel_is_compiled(report):
    compiled = {kernel["kernel"] for kernels in report.values() for kernel in kernels}
    modules = {sys.modules[getattr(fused, name).__module__] for name in fused.__all__}
    written = {
        name for module in modules for name in vars(module) if name.endswith("_kernel")
    }
    assert compiled == written
    assert set(report) == set(CASES)


@pytest.mark.parametrize(
    ("stored", "loaded", "spills"),
    [("0010", "0070", 0), ("0010", "0040", 1), ("0050", "0040", 2)],
)
def test_a_spill_counts_where_a_loop_repeats_it(stored, loaded, spills):
    assembly = f"""
        /*0020*/               @P0 BRA 0x70 ;    /* 0x0000000000000947 */
        /*{loaded}*/                   LDL.LU R24, [R1+0x4] ;
        /*{stored}*/                   STL [R1], R16 ;
        /*0060*/              @!P0 BRA `(.L) 0x30 ;
    """
    assert spills_in_loops(assembly) == spills


@pytest.mark.parametrize("case", CASES)
def test_nothing_spills_and_everything_fits(case, report):
    for kernel in report[case]:
        assert not kernel["spills_in_loops"], kernel
        assert kernel["stack_bytes"] <= STACK_BYTES, kernel
        assert kernel["registers"] <= 255, kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTERS, kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel


@pytest.mark.parametrize("case", DECODING)
def test_two_programs_that_decode_fit_on_a_multiprocessor(case, report):
    kernel = attention_of(report[case])
    assert PROGRAMS * kernel["registers"] * kernel["threads"] <= REGISTERS, kernel
    shared_bytes = kernel["shared_bytes"] + RESERVED_BYTES
    assert PROGRAMS * shared_bytes <= SHARED_BYTES, kernel


@pytest.mark.parametrize("case", ATTENTION)
def test_keys_and_values_are_fetched_ahead_in_the_widest_copies(case, report):
    kernel, call = attention_of(report[case]), ATTENTION[case]
    assert 16 in kernel["async_copy_bytes"], kernel
    stages = 2 if call.rotary else SETTINGS.attention_stages
    row_bytes = call.head_dim * call.dtype.itemsize
    tile_bytes = SETTINGS.attention_tile_bytes
    if call.dtype == torch.float32:
        tile_bytes //= 2
    tile_bytes = min(tile_bytes, MAX_TOKENS * row_bytes)
    if call.fp8:
        tile_bytes //= call.dtype.itemsize
    keys_and_values = 2 * tile_bytes
    assert kernel["shared_bytes"] >= (stages - 1) * keys_and_values, kernel


def test_no_batch_asks_for_another_compilation(report):
    kernels = [kernel["kernel"] for kernel in report["batches"]]
    split_and_whole = ["attention_kernel"] * 2
    # Three products, of few rows and of more.
    products = ["linear_kernel"] * 6
    assert sorted(kernels) == [*split_and_whole, *products, "merge_kernel"]


def test_no_prompt_asks_for_another_compilation(report):
    kernels = [kernel["kernel"] for kernel in report["prompts"]]
    assert kernels == ["row_lse_kernel", "received_kernel"]


def test_a_launch_of_many_programs_needs_no_merge(report):
    kernels = [kernel["kernel"] for kernel in report["attention-one-split"]]
    assert kernels == ["attention_kernel"]
