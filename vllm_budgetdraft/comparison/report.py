"""``budgetdraft report``: results as JSON, CSV, and a page that needs nothing else."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from vllm_budgetdraft.comparison.summary import best_lengths, same, to_csv
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.files import read_object, write_text

RESULTS = "results.json"
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", help="folders of budgetdraft evaluate")
    parser.add_argument("--output", required=True, metavar="FILE", help="an HTML page")


def run(args: Namespace) -> None:
    """Several runs on one page, each method named after its run.

    Raises:
        ConfigurationError: a folder has no results, or others.
    """
    documents = {}
    for folder in map(Path, args.results):
        path = folder / RESULTS
        if not path.is_file():
            raise ConfigurationError(
                f"{folder} has no {RESULTS}; give folders that budgetdraft evaluate "
                "wrote to their end"
            )
        documents[folder.name] = _document(path)
    write_text(Path(args.output), page(documents))
    print(f"Written to {args.output}.")


def _document(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if missing := {"results", "serving", "notes", "provenance"} - set(found):
        raise ConfigurationError(
            f"{path} has no {sorted(missing)}; give folders that budgetdraft evaluate "
            "wrote"
        )
    return found


def write(folder: Path, document: dict[str, Any]) -> None:
    """results.json, results.csv, report.html and its first figure."""
    from vllm_budgetdraft.comparison.figures import speedups

    text = json.dumps(document, indent=1)
    write_text(folder / RESULTS, text + "\n")
    rows = document["results"]
    write_text(folder / "results.csv", to_csv(rows))
    figure = speedups(best_lengths(_labelled(rows)))
    write_text(folder / "speedup.svg", figure)
    html = page({folder.name: document})
    write_text(folder / "report.html", html)


def page(documents: dict[str, dict[str, Any]]) -> str:
    """
    Args:
        documents: what ``write`` takes, by the run's name.
    """
    import jinja2

    from vllm_budgetdraft.comparison.figures import all_figures

    several = len(documents) > 1
    rows, served = (
        [
            row
            for name, document in documents.items()
            for row in _labelled(document[part], name if several else "")
        ]
        for part in ("results", "serving")
    )
    best = best_lengths(rows)
    machine = next(iter(documents.values()))["provenance"]["machine"]
    notes = [note for each in documents.values() for note in each["notes"]]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title="vLLM and its drafters: " + ", ".join(documents),
        subtitle=f"{machine['gpu'] or machine['cpu']}, "
        + ", ".join(each["provenance"]["time"][:10] for each in documents.values()),
        tiles=_tiles(best),
        notes=list(dict.fromkeys(notes)),
        columns=[title for title, _ in COLUMNS],
        table=_table(best),
        figures=all_figures(rows, best, served),
        serving_columns=[title for title, _ in SERVING_COLUMNS],
        serving=[[of(row) for _, of in SERVING_COLUMNS] for row in served],
        provenance=json.dumps(
            {name: each["provenance"] for name, each in documents.items()}, indent=1
        ),
    )


def _labelled(rows: list[dict[str, Any]], run: str = "") -> list[dict[str, Any]]:
    """Rows whose task says which run they are of, and at which temperature above 0.

    Older results have no temperature, and no task of what was served.
    """
    found = []
    for row in rows:
        older = {"task": "vllm serve", "temperature": 0.0, "drafts": None}
        row = {**older, **row}
        label = row["task"] + (f" ({run})" if run else "")
        if row["temperature"]:
            label += f", temperature {row['temperature']:g}"
        found.append({**row, "task": label})
    return found


def _tiles(best: list[dict[str, Any]]) -> list[dict[str, str]]:
    """BudgetDraft's speed-ups at each task's longest context."""
    from vllm_budgetdraft.comparison.figures import at_longest

    tiles = []
    longest = at_longest(best)
    for task in dict.fromkeys(row["task"] for row in best):
        ours = [
            row
            for row in longest
            if (row["kind"], row["task"]) == ("budgetdraft", task)
        ]
        if ours:
            row = max(ours, key=lambda each: each["speedup"])
            label = f"{task}, {_context(row)} tokens, prompt included"
            if row["decode_speedup"]:
                label += f" ({row['decode_speedup']:.2f}x after the first token)"
            tiles.append({"value": f"{row['speedup']:.2f}x", "label": label})
    return tiles


def _context(row: dict[str, Any]) -> str:
    """Tokens of prompts: of all, or the median where they are as long as they are."""
    longest = row["context_tokens"]
    median = row.get("prompt_tokens", longest)  # older results have none
    if median == longest:
        return f"{longest:,}"
    return f"{median:,.0f} (to {longest:,})"


def _number(key: str, form: str) -> Any:
    return lambda row: "" if row[key] is None else format(row[key], form)


def _spread(key: str) -> Any:
    return lambda row: (
        ""
        if row[key] is None
        else f"{row[key]:.2f}x ({row[f'{key}_p20']:.2f}-{row[f'{key}_p80']:.2f})"
    )


def _acceptance(row: dict[str, Any]) -> str:
    if row["acceptance_length"] is None:
        return ""
    low, high = (row.get(f"acceptance_length_{end}") for end in ("low", "high"))
    interval = "" if low is None else f" ({low:.2f}-{high:.2f})"  # older have none
    return f"{row['acceptance_length']:.2f}{interval}"


def _same(row: dict[str, Any]) -> str:
    gap = row.get("output_gap")  # older results have none
    return same(row) + ("" if gap is None else f", gap {gap:.3g}")


COLUMNS = [
    ("task", lambda row: row["task"]),
    ("method", lambda row: row["method"]),
    ("context", _context),
    ("tok/s", _number("output_throughput", ".1f")),
    ("speed-up", _spread("speedup")),
    ("decode", _spread("decode_speedup")),
    ("TTFT ms", _number("ttft_ms", ",.0f")),
    ("TPOT ms", _number("tpot_ms", ".2f")),
    ("acceptance", _acceptance),
    ("drafts", lambda row: row["drafts"] or ""),
    ("distinct", _number("distinct_4grams", ".2f")),
    ("same", _same),
    ("peak GiB", lambda row: f"{row['peak_memory_bytes'] / 2**30:.2f}"),
]


SERVING_COLUMNS = [
    ("task", lambda row: row["task"]),
    ("method", lambda row: row["method"]),
    ("concurrency", _number("max_concurrency", "d")),
    ("requests/s", _number("request_throughput", ".2f")),
    ("tok/s", _number("output_throughput", ".1f")),
    ("speed-up", _number("speedup", ".2f")),
    ("drafts", lambda row: row["drafts"] or ""),
    ("median TTFT ms", _number("median_ttft_ms", ",.0f")),
    ("median TPOT ms", _number("median_tpot_ms", ".2f")),
    ("p99 TPOT ms", _number("p99_tpot_ms", ".2f")),
    ("median ITL ms", _number("median_itl_ms", ".2f")),
]


def _table(best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = sorted(best, key=lambda row: (row["task"], row["context_tokens"]))
    table = []
    previous = None
    for row in rows:
        place = row["task"], row["context_tokens"]
        classes = ["first"] if place != previous else []
        classes += ["ours"] if row["kind"] == "budgetdraft" else []
        cells = [of(row) for _, of in COLUMNS]
        table.append({"classes": " ".join(classes), "cells": cells})
        previous = place
    return table
