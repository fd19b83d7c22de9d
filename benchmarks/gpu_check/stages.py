"""The parts of the check that are commands: what they run, and what they found."""

import importlib.util
import json
import os
import shlex
import time
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu_check.rows import (
    FAILED,
    CheckFailedError,
    Row,
    all_hold,
    read,
    row_of,
)

# How a GPU session runs its stages: bounded, and ended with all that they started.
from benchmarks.gpu_session import Stage, run_stage

#: Tests that run natively where there is a GPU.
NATIVE_TESTS = ("tests/kernel_parity", "tests/unit/test_packed_attention.py")


@dataclass(frozen=True)
class Part:
    """A stage of this check.

    Attributes:
        stage: with its minutes where the whole check has six.
        result: the file that it writes.
        rows: what that file says was found.
    """

    stage: Stage
    result: Path
    rows: Callable[[], list[Row]]


def run(part: Part, seconds: float) -> list[Row]:
    """Runs a part; its rows, with one that failed if the command did."""
    folder, name = part.result.parent, part.stage.name
    log = folder / f"{name}.log"
    for old in (part.result, log):
        old.unlink(missing_ok=True)
    begun = time.monotonic()
    status = run_stage(part.stage, folder, seconds)
    took = round(time.monotonic() - begun, 1)
    rows = part.rows() if part.result.is_file() else []
    if [row.name for row in rows] == [name]:  # one for all of the command
        rows = [replace(rows[0], seconds=took)]
    says_why = status.startswith("failed") and not all_hold(rows)
    if (status == "done" and rows) or says_why:
        return rows
    reason = status if status != "done" else "it found nothing"
    return [*rows, Row(name, FAILED, f"{reason}; see {log}", took)]


def engines(runner: str, args: Namespace, *, has_half: bool) -> Part:
    """Engines of one model runner of vLLM; ``has_half``: one in bfloat16, too."""
    name = f"engines-{runner}"
    options = " --half" * has_half + " --tiny" * args.tiny
    result = args.output / f"{name}.jsonl"
    output = shlex.quote(str(result))
    command = f"-m benchmarks.gpu_check.engines {output} --runner {runner}{options}"
    return Part(Stage(name, 3.9, command), result, lambda: read(result))


def kernels(args: Namespace) -> Part:
    """The tests of kernels, natively on a GPU."""
    if importlib.util.find_spec("xdist") is None:
        parallel, how = "", "one process, which is slow: install pytest-xdist"
    else:
        # Engines start meanwhile.
        parallel = how = f"-n {max(1, (os.cpu_count() or 1) // 2 - 1)}"
    result = args.output / "kernels.xml"
    chosen = "-k signatures" if args.tiny else ""
    command = (
        f"-m pytest -q -p no:cacheprovider {shlex.join(NATIVE_TESTS)} {chosen} "
        f"{parallel} --junitxml={shlex.quote(str(result))}"
    )
    stage = Stage("kernels", 3.9, command)
    return _of_one_row(stage, result, lambda file: _tests(file, how))


def _tests(file: Path, how: str) -> str:
    (suite,) = ElementTree.parse(file).getroot().iter("testsuite")
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    passed = total - failed - skipped
    figure = f"{passed} passed, {failed} failed, {skipped} skipped ({how})"
    if failed or not passed:
        raise CheckFailedError(figure)
    return figure


def draft_steps(args: Namespace) -> Part:
    """The time of a draft, eager and as a graph."""
    file = args.output / "draft-steps.json"
    sizes = "--contexts 16384 --repeats 20"
    if args.tiny:
        sizes = "--contexts 600 --batch-sizes 1 --repeats 2"
    command = f"-m benchmarks.draft_steps --output {shlex.quote(str(file))} {sizes}"
    return _of_one_row(Stage("draft-steps", 0.9, command), file, _draft_times)


def _draft_times(file: Path) -> str:
    times: dict[str, dict[int, float]] = {}
    for row in json.loads(file.read_text())["rows"]:
        times.setdefault(row["proposer"], {})[row["batch_size"]] = row["milliseconds"]
    figure = "; ".join(
        f"{name} "
        + ", ".join(f"{ms:.2f} ms at batch {batch}" for batch, ms in each.items())
        for name, each in times.items()
    )
    graphs = times.get("graphs", {})
    if slower := [b for b, ms in graphs.items() if ms > times["eager"][b]]:
        raise CheckFailedError(f"graphs are slower at batch {slower}: {figure}")
    return figure


def attention(args: Namespace) -> Part:
    """The share of the copy bandwidth that attention over pages reaches."""
    file = args.output / "attention.json"
    sizes = "--batches 1 64 --budgets 512 2048 --contexts 1024 16384"
    if args.tiny:
        sizes = "--shapes llama-68m --batches 2 --budgets 32 --contexts 64"
    command = (
        "-m benchmarks.micro.attention_report "
        f"--output {shlex.quote(str(file))} --time-limit-s 35 {sizes}"
    )
    return _of_one_row(Stage("attention", 1.0, command), file, _bandwidth)


def _bandwidth(file: Path) -> str:
    document = json.loads(file.read_text())
    rows = document["rows"]
    if errors := [row["error"] for row in rows if "error" in row]:
        raise CheckFailedError(f"{len(errors)} of {len(rows)} rows: {errors[0]}")
    measured = [row for row in rows if "copy_bandwidth_share" in row]
    if not measured:
        raise CheckFailedError("no row was measured")
    copying = document["device"]["copy_bandwidth_bytes_per_s"] / 1e9
    shares = ", ".join(
        f"{row['copy_bandwidth_share']:.0%} ({row['shape']}, batch {row['batch']}, "
        f"budget {row['budget']})"
        for row in measured
    )
    left_out = len(document["left_out"])
    rest = f"; {left_out} rows left out, for time" if left_out else ""
    return f"of {copying:,.0f} GB/s: {shares}{rest}"


def _of_one_row(stage: Stage, result: Path, check: Callable[[Path], str]) -> Part:
    return Part(stage, result, lambda: [row_of(stage.name, lambda: check(result))])
