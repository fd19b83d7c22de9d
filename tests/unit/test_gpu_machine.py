"""What a run of tests sees of a GPU, and what it leaves out where vLLM is for one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import conftest

ROOT = Path(__file__).parents[2]
KERNELS = "tests/kernel_parity"


@pytest.fixture
def machine(monkeypatch) -> pytest.MonkeyPatch:
    """With a GPU, and nothing said about it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "")
    return monkeypatch


def configure(*args: str, directory: Path = ROOT) -> tuple[str, str]:
    """What the variables are that tests of ``pytest ARGS`` see."""
    params = SimpleNamespace(dir=directory)
    conftest.pytest_configure(SimpleNamespace(args=args, invocation_params=params))
    return os.environ["TRITON_INTERPRET"], os.environ["CUDA_VISIBLE_DEVICES"]


NATIVE, INTERPRETED = ("", "0"), ("1", "")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([KERNELS], NATIVE),
        ([f"{KERNELS}/test_checks.py::test_x", str(ROOT / KERNELS)], NATIVE),
        (["tests"], INTERPRETED),
        (["tests/unit", KERNELS], INTERPRETED),
        (["tests/unit/test_kernel_parity.py"], INTERPRETED),
    ],
)
def test_tests_of_kernels_alone_run_on_the_gpu(machine, args, expected):
    assert configure(*args) == expected


def test_paths_are_those_of_where_pytest_is_started(machine):
    assert configure("kernel_parity", directory=ROOT / "tests") == NATIVE
    assert configure("kernel_parity") == INTERPRETED


def test_who_says_it_decides(machine):
    machine.setenv("TRITON_INTERPRET", "0")
    assert configure("tests/unit") == ("0", "0")
    machine.setenv("TRITON_INTERPRET", "1")
    assert configure(KERNELS) == INTERPRETED


@pytest.mark.parametrize("asked", ["", "0"])
def test_without_a_gpu_all_is_interpreted(machine, asked):
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setenv("TRITON_INTERPRET", asked)
    assert configure(KERNELS) == INTERPRETED


def test_kernels_are_compiled_where_tests_of_them_see_a_gpu(tmp_path):
    """In a run of pytest, where it matters what is imported before what."""
    pytest.importorskip("triton")
    (tmp_path / "gpu.py").write_text(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "def pytest_collection_finish():\n"
        "    from budgetdraft_kernels import page_compaction\n"
        "    from triton.runtime.jit import JITFunction\n"
        "    kernels = vars(page_compaction).values()\n"
        "    print('compiled:', any(isinstance(k, JITFunction) for k in kernels))\n"
    )
    variables = {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": ""}
    done = subprocess.run(
        [sys.executable, *"-m pytest -q --collect-only -p gpu".split(), KERNELS]
        + ["-k", "signatures"],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert "compiled: True" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("version", "is_left_out"), [("0.33.0", True), ("0.32.0+cpu", False)]
)
def test_engines_are_left_out_where_vllm_has_no_cpu(monkeypatch, version, is_left_out):
    monkeypatch.setattr(conftest, "version", lambda name: version)
    marks: dict[str, list[str]] = {"engine": [], "other": []}

    def item(name: str, marker: object) -> SimpleNamespace:
        return SimpleNamespace(
            path=Path(f"test_{name}.py"),
            get_closest_marker=lambda wanted: marker if wanted == "vllm" else None,
            add_marker=lambda mark: marks[name].append(mark.kwargs["reason"]),
        )

    conftest.pytest_collection_modifyitems([item("engine", 1), item("other", None)])
    assert marks["other"] == []
    assert [version in reason for reason in marks["engine"]] == [True] * is_left_out
