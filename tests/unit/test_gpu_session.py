"""Stages of a GPU session: bounded, resumed, and not kept from running by others."""

import argparse
import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu_session import Stage, run, stages
from tests.support.engines import wait_until

COUNTS = '-c \'open("count", "a").write("x")\''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def soon(minutes: float = 1.0) -> float:
    return time.monotonic() + 60 * minutes


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_is_done_is_not_done_again_and_what_failed_is(folder):
    chosen = [Stage("good", 1, COUNTS), Stage("bad", 1, f"{COUNTS[:-1]}; 1 / 0'")]
    for _ in range(2):
        found = run(chosen, folder / "out", soon())
        assert found["good"]["status"] == "done"
        assert found["bad"]["status"] == "failed with 1"
    assert Path("count").read_text() == "xxx"
    assert json.loads(Path("out/stages.json").read_text()) == found
    assert Path("out/bad.log").read_text().count("ZeroDivisionError") == 2


def test_a_failure_keeps_those_from_running_that_need_it_alone(folder):
    chosen = [
        Stage("bad", 1, "-c '1 / 0'"),
        Stage("above", 1, COUNTS, needs=("bad",)),
        Stage("beside", 1, COUNTS),
    ]
    found = run(chosen, folder / "out", soon())
    assert found["above"]["status"] == "needs bad"
    assert found["beside"]["status"] == "done"
    assert Path("count").read_text() == "x"


def test_a_stage_that_takes_too_long_ends_with_all_that_it_started(folder):
    starts_another = (
        "-c 'import subprocess, sys, time; "
        'child = subprocess.Popen([sys.executable, "-c", "import time; '
        'time.sleep(60)"]); open("child", "w").write(str(child.pid)); time.sleep(60)\''
    )
    begun = time.monotonic()
    found = run([Stage("slow", 2 / 60, starts_another)], folder / "out", soon())
    assert found["slow"]["status"] == "ended after 2 s"
    assert time.monotonic() - begun < 20
    child = int(Path("child").read_text())
    assert wait_until(lambda: not is_running(child), seconds=5)


def test_nothing_begins_after_the_deadline(folder):
    found = run([Stage("late", 1, COUNTS)], folder / "out", time.monotonic())
    assert found["late"]["status"] == "no time was left"
    assert not Path("count").exists()


@pytest.mark.parametrize("tiny", [False, True])
def test_stages_need_only_what_comes_before_them(folder, tiny):
    args = argparse.Namespace(
        output=folder, texts=["a b"], held_out="c", engine_args={}, tiny=tiny
    )
    seen: set[str] = set()
    for stage in stages(args):
        assert set(stage.needs) <= seen
        seen.add(stage.name)
    assert {"kernels", "draft_steps", "target", "drafter", "evaluate"} <= seen
