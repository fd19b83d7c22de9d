"""``budgetdraft evaluate`` with real engines and a real server, of tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.books import write_books, write_target

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_target(folder / "target", head_dim=32)  # vLLM takes no smaller one
    write_books(folder / "books.jsonl")
    return folder


def evaluate(inputs: Path, output: Path, *more: str) -> None:
    """In a process of its own, as a user would."""
    target = str(inputs / "target")
    command = [
        *("evaluate", "--target", target, "--drafter", target, "--output", str(output)),
        *("--data", f"books={inputs / 'books.jsonl'}", "--context-tokens", "60", "90"),
        *("--methods", "budgetdraft", "--kv-budgets", "32", "--prompts", "2"),
        *("--num-speculative-tokens", "4", "--new-tokens", "12"),
        *("--engine-args", '{"enforce_eager": true}', *more),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "vllm_budgetdraft", *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def evaluated(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluated")
    evaluate(inputs, output)
    return output


def test_every_method_has_a_row_for_each_context(evaluated):
    document = json.loads((evaluated / "results.json").read_text())
    rows = document["results"]
    lengths = {(row["kind"], row["num_speculative_tokens"]) for row in rows}
    assert lengths == {("vllm", None), ("budgetdraft", 4)}
    assert len(rows) == 2 * len(lengths)
    for row in rows:
        assert row["num_runs"] == 2 and row["output_identical"] == 1
        assert row["draft_share"] + row["verify_share"] + row["rest_share"] == (
            pytest.approx(1)
        )
        assert row["peak_memory_bytes"] > 2**20
        if row["kind"] == "budgetdraft":  # of a target that drafts for itself
            assert len(row["acceptance_per_position"]) == 4
            assert row["draft_share"] > 0.05
    assert "No meetings (QMSum) were given." in document["notes"]
    assert document["provenance"]["versions"]


def test_a_run_goes_on_where_it_stopped_and_can_be_served_then(evaluated, inputs):
    rounds = (evaluated / "rounds.jsonl").read_text().splitlines(keepends=True)
    (evaluated / "rounds.jsonl").write_text("".join(rounds[:-1]) + rounds[-1][:40])
    evaluate(inputs, evaluated, "--concurrency", "2", "--serving-repeats", "1")
    again = (evaluated / "rounds.jsonl").read_text().splitlines(keepends=True)
    assert again[:-1] == rounds[:-1]
    last, before = json.loads(again[-1]), json.loads(rounds[-1])
    assert last["index"] == before["index"] and last["runs"] != before["runs"]
    rows = json.loads((evaluated / "results.json").read_text())["serving"]
    assert len(rows) == 2
    for row in rows:
        assert row["max_concurrency"] == 2 and row["num_runs"] == 1
        assert row["completed"] == 4
        assert row["median_ttft_ms"] > 0 and row["mean_itl_ms"] > 0
    html = (evaluated / "report.html").read_text()
    assert "Behind vllm serve" in html
