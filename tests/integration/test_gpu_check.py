"""``make gpu-check`` in small on a CPU: every part of it, with engines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu_check.engine_checks import num_graphs

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("runner", ["V1", pytest.param("V2", marks=pytest.mark.slow)])
def test_all_holds_here(runner, tmp_path):
    roots = [ROOT, ROOT / "kernels"]
    if runner == "V2":
        roots.insert(0, ROOT / "tests" / "support" / "startup_v2")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--tiny", "--runners", runner]
        + ["--minutes", "30", "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu-check.json").read_text())
    status = {row["name"]: row["status"] for row in document["rows"]}
    skipped = {name for name in status if status[name] == "skipped"}
    left_out = {"V2"} if runner == "V1" else set()
    assert skipped == {f"{runner} CUDA graphs"} | left_out
    for name in ("kernels", "draft-steps", "attention", f"{runner} self is greedy"):
        assert status[name] == "ok"


def test_the_number_of_graphs_is_found_in_what_is_logged(monkeypatch):
    from vllm_budgetdraft.vllm_integration import core_loader

    lines = []
    monkeypatch.setattr(
        core_loader.logger, "info", lambda text, *args: lines.append(text % args)
    )
    core = SimpleNamespace(capture_graphs=lambda capture: 64)
    core_loader.capture_graphs(core, None)
    assert num_graphs("\n".join(lines)) == 64
