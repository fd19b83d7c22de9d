"""Files of rows, one after the other, each complete or not there."""

from pathlib import Path
from typing import Any

from vllm_budgetdraft.files import replace


def missing_parts(items: Any, size: int, output: Path) -> dict[Path, Any]:
    """Items of each file that is missing."""
    parts = {
        output / f"part-{first // size:05}.parquet": items[first : first + size]
        for first in range(0, len(items), size)
    }
    missing = {path: each for path, each in parts.items() if not path.is_file()}
    print(f"{len(parts) - len(missing)} of {len(parts)} files are there already")
    return missing


def write_part(path: Path, rows: list[dict[str, Any]], top_logprobs: int) -> None:
    """Parquet, whose columns are the same where there are no rows."""
    from datasets import Dataset, Features, List, Value

    tokens = List(Value("int64"))
    columns = {
        "prompt": tokens,
        "continuation": tokens,
        "temperature": Value("float64"),
    }
    if top_logprobs:
        columns |= {
            "top_ids": List(tokens),
            "top_logprobs": List(List(Value("float64"))),
        }
    rows_of_file = Dataset.from_list(rows, features=Features(columns))
    replace(path, rows_of_file.to_parquet)
    print(f"{path}: {len(rows)} continuations", flush=True)
