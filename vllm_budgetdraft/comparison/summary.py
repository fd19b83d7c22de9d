"""What the runs of a comparison say: one row for each method, task and context."""

import csv
import io
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_budgetdraft.comparison.methods import PLAIN, Method

#: Tokens of what is counted to say how much an output repeats itself.
NGRAM = 4


def summarise(
    methods: list[Method], rounds: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows, of plain data.

    Throughputs and latencies are medians over prompts. Speed-ups are over the plain run
    of the same turn: median, 20th and 80th percentile. ``output_gap`` is the widest of
    the races where an output differs (see ``races``), ``output_ties`` how many of them
    are ties. Where a figure does not apply to a method it is None.
    """
    found = defaultdict(list)
    for each in rounds:
        for name in each["runs"]:
            found[each["task"], each["context_tokens"], name].append(each)
    return [
        {
            "method": method.name,
            "kind": method.kind,
            "num_speculative_tokens": method.num_speculative_tokens or None,
            "kv_budget": method.kv_budget or None,
            "eviction_policy": method.eviction_policy or None,
            "task": task,
            "context_tokens": context,
            **_row(method.name, some),
        }
        for method in methods
        for (task, context, name), some in sorted(found.items())
        if name == method.name
    ]


def _row(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = [(each["runs"][name], each["runs"][PLAIN]) for each in rounds]
    runs = [run for run, _ in pairs]
    races = [r["races"][name] for r in rounds if name in r.get("races", {})]
    drafts = sum(run["num_drafts"] for run in runs)
    accepted = np.sum([run["accepted_per_position"] for run in runs], 0)
    return {
        "num_runs": len(runs),
        "output_throughput": _median(
            runs, lambda run: len(run["token_ids"]) / run["seconds"]
        ),
        "ttft_ms": _median(
            runs, lambda run: 1e3 * (run["seconds"] - run["decode_seconds"])
        ),
        "tpot_ms": _median(
            runs,
            lambda run: 1e3 * run["decode_seconds"] / max(1, len(run["token_ids"]) - 1),
        ),
        **_percentiles("speedup", [b["seconds"] / a["seconds"] for a, b in pairs]),
        **_percentiles(
            "decode_speedup",
            [b["decode_seconds"] / a["decode_seconds"] for a, b in pairs],
        ),
        "acceptance_length": 1 + accepted.sum() / drafts if drafts else None,
        "acceptance_per_position": [float(x) / drafts for x in accepted]
        if drafts
        else [],
        "output_identical": float(
            np.mean([a["token_ids"] == b["token_ids"] for a, b in pairs])
        ),
        "output_ties": sum(race["is_tie"] for race in races),
        "output_gap": max((race["gap"] for race in races), default=None),
        "distinct_4grams": float(
            np.mean([_distinct(run["token_ids"]) for run in runs])
        ),
        **_shares([e["profiles"][name] for e in rounds if name in e["profiles"]]),
        **_engine(rounds[-1]["engines"][name]),
    }


def _median(runs: list[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    return float(np.median([of(run) for run in runs]))


def _percentiles(name: str, values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [20, 50, 80])
    return {name: float(middle), f"{name}_p20": float(low), f"{name}_p80": float(high)}


def _distinct(tokens: list[int]) -> float:
    """Share of n-grams that are not said again: 1 where nothing is repeated."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return len(set(grams)) / max(1, len(grams))


def _shares(profiles: list[dict[str, float]]) -> dict[str, float | None]:
    total = sum(sum(profile.values()) for profile in profiles)
    return {
        f"{part}_share": sum(p[part] for p in profiles) / total if total else None
        for part in ("draft", "verify", "rest")
    }


def _engine(described: dict[str, Any]) -> dict[str, Any]:
    return {key: described[key] for key in ("peak_memory_bytes", "kv_cache_tokens")}


def same(row: dict[str, Any]) -> str:
    """Whether outputs equal plain vLLM's: yes, or how many ties and faults there are.

    A difference without a race, as in float32, is a fault.
    """
    different = round(row["num_runs"] * (1 - row["output_identical"]))
    ties = row.get("output_ties", 0)  # older results have none
    said = [f"NO ({different - ties})"] if different > ties else []
    said += [f"{ties} tie{'s' if ties > 1 else ''}"] if ties else []
    return ", ".join(said) or "yes"


def best_lengths(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that differ in their draft length only, the fastest."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(
            row[name]
            for name in (
                *("kind", "eviction_policy", "kv_budget", "task", "context_tokens"),
            )
        )
        if key not in best or row["speedup"] > best[key]["speedup"]:
            best[key] = row
    return list(best.values())


def to_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; lists have spaces between their elements."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                key: " ".join(f"{x:.4f}" for x in value)
                if isinstance(value, list)
                else value
                for key, value in row.items()
            }
        )
    return text.getvalue()
