"""Attention over pages against its targets, as a table and as JSON.

    python -m benchmarks.micro.attention_report --output benchmarks/results/FILE.json
    python -m benchmarks.micro.attention_report --output FILE.json --sweep-settings

Measures the share of the copy bandwidth that attention reaches by batch and budget;
PyTorch's SDPA and vLLM's Triton attention over the same pages; and whether time depends
on the context (see ``contexts`` for what that can mean with a bounded cache). Times
that count are of calls in a CUDA graph. On a CPU the reference is measured on small
inputs, which says nothing about the targets: it shows that the report works.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.micro import settings_sweep, targets, timing
from benchmarks.micro.attention_rows import Cell, row_of
from benchmarks.micro.report_file import Deadline, ReportFile, Row
from benchmarks.micro.targets import time_us
from benchmarks.micro.workloads import PAGE_SIZE, SEED, SHAPES, draft_dtype
from budgetdraft_kernels import launch_settings
from vllm_budgetdraft.attention.backend import default_device


@dataclass(frozen=True)
class Sizes:
    """What is measured unless the command line says otherwise."""

    batches: Sequence[int]
    budgets: Sequence[int]
    contexts: Sequence[int]
    context_batches: Sequence[int]
    context_budget: int
    sweep_budgets: Sequence[int]


SIZES = {
    "cuda": Sizes(
        batches=(1, 8, 64, 256),
        budgets=(256, 512, 1024, 2048),
        contexts=(1 << 10, 1 << 14, 1 << 17),
        context_batches=(8, 64),
        context_budget=512,
        sweep_budgets=(512, 2048),
    ),
    "cpu": Sizes(
        batches=(1, 2),
        budgets=(32, 64),
        contexts=(64, 256),
        context_batches=(2,),
        context_budget=32,
        sweep_budgets=(32,),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a row could not be measured, whatever the targets."""
    args = _parser().parse_args(argv)
    device = torch.device(args.device, 0)
    with timing.one_thread(device):
        return _run(args, device)


def _run(args: argparse.Namespace, device: torch.device) -> int:
    deadline, sizes = Deadline(args.time_limit_s), SIZES[device.type]
    report = ReportFile(args.output, device, vars(args), args.commit)
    report.document["inputs"] = {
        "dtype": str(draft_dtype(device)),
        "page_size": PAGE_SIZE,
        "query_tokens": 1,
        "seed": SEED,
        "shapes": [asdict(SHAPES[name]) for name in args.shapes],
    }
    report.document["launch_settings"] = asdict(launch_settings.settings_of(device))
    if args.sweep_settings:
        summary = _sweep(args, sizes, report, device, deadline)
    else:
        summary = _compare(args, sizes, report, device, deadline)
    failed = [row for row in report.rows if "error" in row]
    complete = not report.document["left_out"]
    report.finish(complete=complete, **summary)
    bandwidth = report.document["device"]["copy_bandwidth_bytes_per_s"]
    counts = {"rows": len(report.rows), "failed_rows": len(failed)}
    last_line = {"output": str(report.path), "complete": complete} | counts
    last_line |= {"copy_bandwidth_bytes_per_s": bandwidth} | summary
    print(json.dumps(last_line, separators=(",", ":")), flush=True)
    # A sweep tries what may not fit.
    return 1 if failed and not args.sweep_settings else 0


def planned_cells(args: argparse.Namespace, sizes: Sizes) -> list[Cell]:
    """What the targets are about first, for time may run out."""
    bandwidth = [
        Cell(shape, batch, budget)
        for shape in args.shapes
        for budget in args.budgets or sizes.budgets
        for batch in args.batches or sizes.batches
    ]
    contexts = [
        Cell(shape, batch, sizes.context_budget, context)
        for shape in args.shapes
        for batch in sizes.context_batches
        for context in args.contexts or sizes.contexts
    ]
    due = [cell for cell in bandwidth if _is_due(cell)]
    return due + contexts + [cell for cell in bandwidth if not _is_due(cell)]


def _compare(
    args: argparse.Namespace,
    sizes: Sizes,
    report: ReportFile,
    device: torch.device,
    deadline: Deadline,
) -> Row:
    bandwidth = report.document["device"]["copy_bandwidth_bytes_per_s"]
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s; medians in us\n{TITLES}")
    left_out = []
    for cell in planned_cells(args, sizes):
        if deadline.passed():
            left_out.append(asdict(cell))
            continue
        row = row_of(cell, device, bandwidth)
        report.add(row)
        print(_line(row), flush=True)
    report.document["left_out"] = left_out
    report.document["flatness"] = targets.flatness(report.rows)
    for each in report.document["flatness"]:
        where = f"{each['shape']} batch {each['batch']} budget {each['budget']}"
        print(f"over contexts, {where}, {each['what']}: {each['spread']:.1%} apart")
    for name, error in sorted(_errors(report.rows)):
        print(f"{name}: {error}")
    if left_out:
        print(f"{len(left_out)} rows left out: time ran out")
    # Targets are of the kernels, which a CPU does not run.
    verdicts = targets.verdicts(report.rows if device.type == "cuda" else [])
    for name, met in verdicts.items():
        print(
            f"{name}: {'not measured' if met is None else 'met' if met else 'MISSED'}"
        )
    return {"targets": verdicts}


def _sweep(
    args: argparse.Namespace,
    sizes: Sizes,
    report: ReportFile,
    device: torch.device,
    deadline: Deadline,
) -> Row:
    cells = [
        Cell(shape, batch, budget)
        for shape in args.shapes
        for budget in args.budgets or sizes.sweep_budgets
        for batch in args.batches or sizes.batches
    ]
    best = settings_sweep.sweep(report, cells, device, deadline)
    for name, chosen in best["by_cell"].items():
        print(f"{name:<34}{chosen['time_us']:>9.1f} us  {_settings(chosen)}")
    for name in ("in_use", "together"):
        if (chosen := best[name]) is not None:
            over = f"{chosen['over_least']:.3f} x least"
            print(f"{name:<34}{over:>12}  {_settings(chosen)}")
    if report.document["left_out"]:
        print(f"{len(report.document['left_out'])} candidates left out: time ran out")
    return {"best": best}


COLUMNS = {"vllm": 9, "gather_and_sdpa": 12, "sdpa": 9, "step": 9}
TITLES = (
    f"{'shape':<11}{'batch':>6}{'budget':>7}{'context':>8}{'splits':>7}{'ours':>9}"
    f"{'share':>7}{'vllm':>9}{'gather+sdpa':>12}{'sdpa':>9}{'step':>9}"
)


def _line(row: Row) -> str:
    """A row as people read it; under ``sdpa`` the gather was made beforehand."""
    context = "" if row["context"] is None else row["context"]
    named = f"{row['shape']:<11}{row['batch']:>6}{row['budget']:>7}{context:>8}"
    if "error" in row:
        return f"{named}  {row['error']}"
    times = row["times"]
    ours = times["ours"] if "ours" in times else times["attention"]
    share = row.get("copy_bandwidth_share")
    line = f"{named}{row.get('splits') or '':>7}{time_us(ours):>9.1f}"
    line += f"{share:>7.0%}" if share is not None else f"{'':>7}"
    for name, width in COLUMNS.items():
        line += f"{_cell(times.get(name)):>{width}}"
    return line


def _cell(measured: Row | None) -> str:
    if measured is None:
        return ""
    return "error" if "error" in measured else f"{time_us(measured):.1f}"


def _errors(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """What is "error" in the table, and why."""
    return {
        (name, measured["error"])
        for row in rows
        for name, measured in row.get("times", {}).items()
        if "error" in measured
    }


def _settings(chosen: dict[str, Any]) -> str:
    settings = launch_settings.LaunchSettings(**chosen["settings"])
    return f"{settings}, warps {chosen['warps'] or 'by size'}"


def _is_due(cell: Cell) -> bool:
    return targets.bandwidth_is_due(cell.batch, cell.budget)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument(
        "--device",
        choices=tuple(SIZES),
        default=default_device().type,
    )
    parser.add_argument(
        "--time-limit-s",
        type=float,
        default=300.0,
        help="start no row after so many seconds",
    )
    parser.add_argument(
        "--sweep-settings",
        action="store_true",
        help="time block sizes instead, and say which are fastest",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--budgets", nargs="+", type=int, help="in tokens")
    parser.add_argument("--contexts", nargs="+", type=int, help="in tokens")
    parser.add_argument("--commit", help="to record if the checkout has no history")
    return parser


if __name__ == "__main__":
    sys.exit(main())
