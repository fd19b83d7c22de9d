"""Which block sizes are fastest on this device, for ``launch_settings.SETTINGS``."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.micro import workloads
from benchmarks.micro.attention_rows import (
    Cell,
    attempt,
    check,
    expected_outputs,
    graph_times,
    kernels_for,
)
from benchmarks.micro.contenders import Calls
from benchmarks.micro.report_file import Deadline, ReportFile, Row
from benchmarks.micro.workloads import SHAPES
from budgetdraft_kernels import launch_settings
from budgetdraft_kernels.launch_settings import LaunchSettings

CHOICES: dict[str, tuple[int, ...]] = {
    "attention_tile_bytes": (8192, 16384, 32768),
    "attention_stages": (2, 3, 4),
    "programs_per_multiprocessor": (1, 2, 4),
}
#: Warps per program; None is what ``launch_settings.warps`` says.
WARPS = (None, 2, 4, 8)
REPEAT_MS = {"cuda": 30, "cpu": 1}


@dataclass(frozen=True)
class Candidate:
    settings: LaunchSettings
    warps: int | None = None


@dataclass(frozen=True)
class Prepared:
    """One cell's calls, and what the first and the last of them return."""

    name: str
    calls: Calls
    expected: Sequence[Tensor]


def candidates(start: LaunchSettings) -> list[Candidate]:
    """``start`` and every combination, those first that differ least from it."""
    chosen = [
        Candidate(replace(start, **dict(zip(CHOICES, values, strict=True))), warps)
        for values in itertools.product(*CHOICES.values())
        for warps in WARPS
    ]
    own = Candidate(start)
    others = (candidate for candidate in chosen if candidate != own)
    return [own, *sorted(others, key=partial(_changes, start))]


def sweep(
    report: ReportFile, cells: Sequence[Cell], device: torch.device, deadline: Deadline
) -> Row:
    """Times the candidates until the deadline, and returns the best of them."""
    prepared = [_prepare(cell, device) for cell in cells]
    left_out = []
    for candidate in candidates(launch_settings.settings_of(device)):
        if deadline.passed():
            left_out.append(candidate)
            continue
        row = {"kind": "settings"} | asdict(candidate)
        report.add(row | attempt(partial(_measured, candidate, prepared, device)))
    report.document["left_out"] = [asdict(candidate) for candidate in left_out]
    return best(report.rows)


def best(rows: Sequence[Row]) -> Row:
    """The best candidate of all cells together, and the best of each cell.

    Together: the least geometric mean of times over each cell's least time, among
    candidates that were timed in every cell. The first row is of the settings in use.
    """
    timed = [row for row in rows if "times_us" in row]
    if not timed:
        return {"together": None, "in_use": None, "by_cell": {}}
    least = {
        name: min(row["times_us"][name] for row in timed)
        for name in timed[0]["times_us"]
    }

    def over_least(row: Row) -> float:
        return statistics.geometric_mean(
            row["times_us"][name] / time_us for name, time_us in least.items()
        )

    def chosen(row: Row) -> Row:
        return {"settings": row["settings"], "warps": row["warps"]}

    def judged(row: Row) -> Row:
        return chosen(row) | {"over_least": over_least(row)}

    return {
        "together": judged(min(timed, key=over_least)),
        "in_use": judged(rows[0]) if rows[0] in timed else None,
        "by_cell": {
            name: chosen(min(timed, key=lambda row: row["times_us"][name]))
            | {"time_us": time_us}
            for name, time_us in least.items()
        },
    }


@contextmanager
def in_force(candidate: Candidate) -> Iterator[None]:
    """Kernels launch as the candidate says."""
    changes: dict[str, Any] = {"settings_of": lambda device: candidate.settings}
    if candidate.warps is not None:
        changes["warps"] = lambda *_: candidate.warps
    with patch.multiple(launch_settings, **changes):
        yield


def _changes(start: LaunchSettings, candidate: Candidate) -> int:
    named = (field.name for field in fields(start))
    changed = sum(
        getattr(start, name) != getattr(candidate.settings, name) for name in named
    )
    return changed + (candidate.warps is not None)


def _prepare(cell: Cell, device: torch.device) -> Prepared:
    workload = workloads.attention(SHAPES[cell.shape], cell.batch, cell.budget, device)
    kernel = kernels_for(device).paged_sparse_attention
    calls = workload.calls(kernel, validate=False)
    name = f"{cell.shape} batch {cell.batch} budget {cell.budget}"
    return Prepared(name, calls, expected_outputs(workload))


def _measured(
    candidate: Candidate, prepared: Sequence[Prepared], device: torch.device
) -> Row:
    """Medians by cell.

    Raises:
        RedGateError: a result is wrong.
        Exception: Triton's, if a tile does not fit into shared memory.
    """
    times_us, repeat_ms = {}, REPEAT_MS[device.type]
    with in_force(candidate):
        for cell in prepared:
            check(cell.calls, cell.expected)
            measured = graph_times(cell.calls, device, repeat_ms)
            times_us[cell.name] = measured.p50_us
    return {"times_us": times_us}
