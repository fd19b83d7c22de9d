"""The JSON file of a run: whole after every row, whenever the run ends."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.micro import timing
from vllm_budgetdraft import provenance

Row = dict[str, Any]


class Deadline:
    """When to start nothing more."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s

    def passed(self) -> bool:
        return time.monotonic() >= self._end


class ReportFile:
    """Rows, with what they were measured on.

    Attributes:
        document: what the file holds.
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device,
        arguments: dict[str, Any],
        commit: str | None = None,
    ) -> None:
        """
        Args:
            commit: to record where the checkout comes without its history.
        """
        self.path = Path(path)
        found = provenance.collect(arguments)
        self.document: dict[str, Any] = {
            "complete": False,
            "provenance": found | {"commit": found["commit"] or commit},
            "device": _device(device),
            "rows": [],
        }
        self.write()

    @property
    def rows(self) -> list[Row]:
        return self.document["rows"]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def finish(self, **results: Any) -> None:
        self.document |= results
        self.write()

    def write(self) -> None:
        """A reader finds the old document or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(self.document, indent=2) + "\n")
        partial.replace(self.path)


def _device(device: torch.device) -> dict[str, Any]:
    described: dict[str, Any] = {
        "type": device.type,
        "cpu_threads": torch.get_num_threads(),
        "copy_bandwidth_bytes_per_s": timing.copy_bandwidth(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "name": properties.name,
            "compute_capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "cache_bytes": timing.cache_bytes(device),
            "memory_bytes": properties.total_memory,
        }
    return described
