"""``make gpu-check``: what its parts find, what becomes of it, and the exit status."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import rows, stages
from benchmarks.gpu_check.rows import FAILED, OK, Row
from benchmarks.gpu_check.stages import Part
from benchmarks.gpu_session import Stage

SLEEPS = "-c 'import time; time.sleep(60)'"


def part(folder: Path, command: str) -> Part:
    """Of one row, which is what the command writes."""
    file = folder / "result"
    return Part(
        Stage("part", 1, command),
        file,
        lambda: [Row("part", *file.read_text().split(), 0.0)],
    )


@pytest.mark.parametrize(
    ("command", "seconds", "status", "figure"),
    [
        ('-c \'open("{}", "w").write("ok fine")\'', 30, OK, "fine"),
        ('-c \'open("{}", "w").write("FAILED bad"); 1 / 0\'', 30, FAILED, "bad"),
        ("-c '1 / 0'", 30, FAILED, "failed with 1; see "),
        ("-c 'pass'", 30, FAILED, "it found nothing; see "),
        (SLEEPS, 0.5, FAILED, "ended after 0 s; see "),
        (SLEEPS, -1, FAILED, "no time was left; see "),
    ],
)
def test_what_a_command_found_or_why_not(tmp_path, command, seconds, status, figure):
    (tmp_path / "result").write_text("ok before")
    command = command.format(tmp_path / "result")
    (row,) = stages.run(part(tmp_path, command), seconds)
    assert (row.name, row.status) == ("part", status)
    assert row.figure.startswith(figure)


def test_what_was_found_before_the_end_of_time_is_kept(tmp_path):
    file = tmp_path / "rows.jsonl"
    found = [Row("first", OK, "", 1.0), Row("second", OK, "", 2.0)]
    code = "; ".join(
        f"rows.append(pathlib.Path({str(file)!r}), rows.{row!r})" for row in found
    )
    imports = "import pathlib, time; from benchmarks.gpu_check import rows"
    command = f'-c "{imports}; {code}; time.sleep(60)"'
    slow = Part(Stage("slow", 1, command), file, lambda: rows.read(file))
    *kept, last = stages.run(slow, 8)
    assert kept == found
    assert (last.name, last.status) == ("slow", FAILED)


XML = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="1"/>'


@pytest.mark.parametrize(
    ("counts", "status"),
    [((9, 0, 0), OK), ((9, 1, 0), FAILED), ((9, 0, 1), FAILED), ((1, 0, 0), FAILED)],
)
def test_tests_are_counted(tmp_path, counts, status):
    found = stages.kernels(Namespace(output=tmp_path, tiny=False))
    found.result.write_text(f"{XML.format(*counts)}</testsuites>")
    (row,) = found.rows()
    assert row.status == status
    assert f"{sum(counts[1:])} failed, 1 skipped" in row.figure


def test_a_machine_without_xdist_is_told_that_tests_take_long(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = stages.kernels(Namespace(output=tmp_path, tiny=False))
    assert " -n " not in found.stage.command
    found.result.write_text(f"{XML.format(9, 0, 0)}</testsuites>")
    assert "install pytest-xdist" in found.rows()[0].figure


@pytest.mark.parametrize(("graph_ms", "status"), [(1.0, OK), (9.0, FAILED)])
def test_graphs_are_to_be_faster(tmp_path, graph_ms, status):
    found = stages.draft_steps(Namespace(output=tmp_path, tiny=False))
    times = [
        {"proposer": name, "batch_size": 8, "milliseconds": ms}
        for name, ms in (("eager", 7.5), ("graphs", graph_ms))
    ]
    found.result.write_text(json.dumps({"rows": times}))
    (row,) = found.rows()
    assert row.status == status
    assert f"graphs {graph_ms:.2f} ms at batch 8" in row.figure


def test_attention_that_could_not_be_measured_fails(tmp_path):
    found = stages.attention(Namespace(output=tmp_path, tiny=False))
    measured = {"shape": "s", "batch": 64, "budget": 512, "copy_bandwidth_share": 0.8}
    device = {"copy_bandwidth_bytes_per_s": 3e12}

    def row_for(*measurements: dict) -> Row:
        document = {"rows": measurements, "device": device, "left_out": [1]}
        found.result.write_text(json.dumps(document))
        return found.rows()[0]

    assert row_for({"error": "disagrees"}, measured).figure == "1 of 2 rows: disagrees"
    assert row_for().status == FAILED
    assert row_for(measured).status == OK
    assert "3,000 GB/s: 80% (s, batch 64, budget 512); 1 rows left" in (
        row_for(measured).figure
    )


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """Runs the command with parts that are stubs, on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("vllm_budgetdraft.diagnosis.env.collect", lambda: FOUND)
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def run(found: dict[str, Row], *argv: str) -> int:
        monkeypatch.setattr(
            stages,
            "run",
            lambda part, seconds: [
                found.get(part.stage.name, Row(part.stage.name, OK, "", seconds))
            ],
        )
        return gpu_check.main(["--output", str(tmp_path), *argv])

    return run


FOUND = {
    "vllm": "0.33.0, supported",
    "plugin": "is loaded by vLLM",
    "torch": "2.13",
    "gpu": "1 x H100",
}


def test_the_exit_status_is_0_where_all_held(stubbed, tmp_path, capsys):
    assert stubbed({}) == 0
    document = json.loads((tmp_path / "gpu-check.json").read_text())
    assert document["holds"]
    assert document["provenance"]["versions"]["torch"]
    names = [row["name"] for row in document["rows"]]
    parts = ["kernels", "engines-V1", "engines-V2", "draft-steps", "attention"]
    assert names == ["environment", *parts]
    table = capsys.readouterr().out
    assert [name for name in names if f"\n{name} " not in table] == []


@pytest.mark.parametrize("name", ["kernels", "engines-V2", "attention"])
def test_the_exit_status_is_1_where_something_failed(stubbed, name):
    assert stubbed({name: Row(name, FAILED, "", 0.0)}) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [("vllm", "0.40.0: too new"), ("plugin", "unknown to vLLM: install this package")],
)
def test_an_environment_in_which_nothing_works_fails(stubbed, monkeypatch, name, text):
    monkeypatch.setitem(FOUND, name, text)
    assert stubbed({}) == 1


def test_an_older_vllm_has_no_runner_v2_and_that_is_no_failure(
    stubbed, monkeypatch, tmp_path
):
    monkeypatch.setitem(FOUND, "vllm", "0.27.1, supported")
    assert stubbed({}) == 0
    table = (tmp_path / "gpu-check.json").read_text()
    assert "engines-V2" not in table
    assert "vLLM 0.27.1 takes no drafter of ours in model runner V2" in table


def test_all_parts_end_within_the_minutes(stubbed, tmp_path):
    assert stubbed({}, "--minutes", "12") == 0
    seconds = {
        row["name"]: row["seconds"]
        for row in json.loads((tmp_path / "gpu-check.json").read_text())["rows"]
    }
    together = max(seconds[n] for n in ("kernels", "engines-V1", "engines-V2"))
    assert together + seconds["draft-steps"] + seconds["attention"] <= 12 * 60


def test_without_a_gpu_it_ends_at_once_and_says_what_to_do(tmp_path, capsys):
    output = tmp_path / "never"
    assert gpu_check.main(["--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert "needs a GPU" in message and "none that torch can use" in message
    assert "run it on a machine with an NVIDIA GPU" in message
    assert not output.exists()
