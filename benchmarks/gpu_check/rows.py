"""What was checked, and what came of it: one row each."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"


class CheckFailedError(Exception):
    """What was checked does not hold; the message says by how much."""


class NotApplicableError(Exception):
    """There is nothing to check here; the message says why."""


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        figure: what was found, or why the check failed or was skipped.
    """

    name: str
    status: str
    figure: str
    seconds: float


def row_of(name: str, check: Callable[[], str]) -> Row:
    """The row of a check that returns what it found, or raises."""
    begun = time.monotonic()
    try:
        status, figure = OK, check()
    except CheckFailedError as error:
        status, figure = FAILED, str(error)
    except NotApplicableError as error:
        status, figure = SKIPPED, str(error)
    except Exception as error:
        last = (str(error).strip() or "no message").splitlines()[-1]
        status, figure = FAILED, f"{type(error).__name__}: {last}"
    return Row(name, status, figure, round(time.monotonic() - begun, 1))


def all_hold(rows: Iterable[Row]) -> bool:
    return all(row.status != FAILED for row in rows)


def as_table(rows: list[Row]) -> str:
    """For people."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'check':<{width}}  {'':<7}  {'s':>5}  figure"]
    for row in rows:
        lines.append(
            f"{row.name:<{width}}  {row.status:<7}  {row.seconds:>5.0f}  {row.figure}"
        )
    return "\n".join(lines)


def append(path: Path, row: Row) -> None:
    """Adds a line of JSON, which stays if the process is ended."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """Rows of ``append``; none if there is no file, and no torn last line."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [Row(**json.loads(line)) for line in whole.splitlines()]
