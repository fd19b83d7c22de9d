"""Stages of a GPU session: bounded, resumed, and not kept from running by others."""

import argparse
import json
import runpy
import shlex
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks import gpu_session
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


def test_what_is_made_is_made_again_where_it_is_gone(folder):
    made = folder / "made"
    makes = Stage("makes", 1, f'{COUNTS[:-1]}; open("made", "w")\'', makes=made)
    for _ in range(2):
        assert run([makes], folder / "out", soon())["makes"]["status"] == "done"
    assert Path("count").read_text() == "x"
    made.unlink()
    run([makes], folder / "out", soon())
    assert Path("count").read_text() == "xx" and made.exists()


def all_stages(folder: Path, **changes) -> list[Stage]:
    values = {"target": "a b", "drafter": "c", "held_out": "d"}
    values |= {"engine_args": {}, "tiny": False, "output": folder / "out"} | changes
    return stages(argparse.Namespace(**values))


@pytest.mark.parametrize("tiny", [False, True])
def test_stages_need_only_what_comes_before_them(folder, tiny):
    seen: set[str] = set()
    for stage in all_stages(folder, tiny=tiny):
        assert set(stage.needs) <= seen
        seen.add(stage.name)
    assert {"kernels", "draft_steps", "acceptance", "evaluate", "batched"} <= seen


def test_all_of_it_takes_twelve_minutes_at_most(folder):
    assert sum(stage.minutes for stage in all_stages(folder)) <= 12.0001


@pytest.mark.parametrize("tiny", [False, True])
def test_every_command_is_one_that_its_module_takes(folder, tiny, monkeypatch):
    """As far as its options go: nothing is run."""
    parse, depth = ArgumentParser.parse_known_args, 0

    def parse_and_leave(parser: ArgumentParser, *args, **kwargs):
        nonlocal depth
        depth += 1
        found, rest = parse(parser, *args, **kwargs)
        depth -= 1
        if depth:  # a subcommand's
            return found, rest
        raise SystemExit(f"{len(rest)} options are unknown")

    monkeypatch.setattr(ArgumentParser, "parse_known_args", parse_and_leave)
    for stage in all_stages(folder, tiny=tiny, engine_args={"seed": 1}):
        _, module, *options = shlex.split(stage.command)
        if module != "pytest":
            monkeypatch.setattr(sys, "argv", [module, *options])
            with pytest.raises(SystemExit, match="0 options are unknown"):
                runpy.run_module(module, run_name="__main__")


def test_the_padded_target_is_not_among_what_comes_back(folder):
    by_name = {stage.name: stage for stage in all_stages(folder)}
    made = by_name["padded"].makes
    assert made == folder / "out-padded"
    for name in ("evaluate", "sampled", "batched"):
        words = shlex.split(by_name[name].command)
        assert words[words.index("--target") + 1] == str(made)
        engine = json.loads(words[words.index("--engine-args") + 1])
        assert engine["attention_config"] == {"backend": "FLASH_ATTN"}


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ("", ["fetched-target", "fetched-drafter"]),
        ("--target a --drafter b", ["a", "b"]),
    ],
)
def test_the_models_are_the_pretrained_pair_if_no_others_are_named(
    options, used, monkeypatch
):
    chosen: list[Stage] = []
    monkeypatch.setattr(gpu_session, "run", lambda stages, *_: chosen.extend(stages))
    pair = ("fetched-target", "fetched-drafter")
    monkeypatch.setattr(gpu_session, "pretrained_pair", {"smollm2": pair}.get)
    words = f"session out --held-out texts --only acceptance {options}"
    monkeypatch.setattr(sys, "argv", words.split())
    gpu_session.main()
    (command,) = (shlex.split(stage.command) for stage in chosen)
    assert [command[command.index(x) + 1] for x in ("--target", "--drafters")] == used


@pytest.mark.parametrize("option", ["--target", "--drafter"])
def test_half_a_pair_is_refused(option, monkeypatch, capsys):
    words = f"session out --held-out texts {option} a"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit, match="2"):
        gpu_session.main()
    assert "--target and --drafter go together" in capsys.readouterr().err
