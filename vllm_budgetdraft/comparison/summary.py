"""What a comparison's runs say: a row for each method, task, context, temperature."""

import csv
import io
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_budgetdraft.comparison.methods import PLAIN, Method

#: Tokens of what is counted to say how much an output repeats itself.
NGRAM = 4
#: Of the prompts, for an interval.
RESAMPLES = 2000


def summarise(
    methods: list[Method], rounds: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows, of plain data.

    Throughputs and latencies are medians over prompts. Speed-ups are of the time for
    each token, over the plain run of the same turn: median, 20th and 80th percentile.
    The interval of ``acceptance_length`` is of prompts like these (bootstrap, 95 %).
    ``output_gap`` is the widest of the races where an output differs (see ``races``),
    ``output_ties`` how many of them are ties; at a temperature outputs are not
    compared. ``drafts`` says how they were picked (see ``Method.drafts_at``). Where a
    figure does not apply it is None.
    """
    found = defaultdict(list)
    for each in rounds:
        for name in each["runs"]:
            place = each["task"], each["context_tokens"], each["temperature"]
            found[*place, name].append(each)
    return [
        {
            "method": method.name,
            "kind": method.kind,
            "num_speculative_tokens": method.num_speculative_tokens or None,
            "kv_budget": method.kv_budget or None,
            "eviction_policy": method.eviction_policy or None,
            "task": task,
            "context_tokens": context,
            "temperature": temperature,
            "drafts": method.drafts_at(temperature),
            **_row(method.name, some),
        }
        for method in methods
        for (task, context, temperature, name), some in sorted(found.items())
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
        "prompt_tokens": float(np.median([each["prompt_tokens"] for each in rounds])),
        "new_tokens": float(np.median([len(run["token_ids"]) for run in runs])),
        "output_throughput": _median(runs, _rate),
        "ttft_ms": _median(
            runs, lambda run: 1e3 * (run["seconds"] - run["decode_seconds"])
        ),
        "tpot_ms": _median(
            runs,
            lambda run: 1e3 * run["decode_seconds"] / max(1, len(run["token_ids"]) - 1),
        ),
        **_percentiles("speedup", [_rate(a) / _rate(b) for a, b in pairs]),
        **_percentiles(
            "decode_speedup",
            [
                _decode_rate(a) / _decode_rate(b)
                for a, b in pairs
                if min(len(a["token_ids"]), len(b["token_ids"])) > 1
            ],
        ),
        "acceptance_length": 1 + accepted.sum() / drafts if drafts else None,
        **_acceptance_interval(runs),
        "acceptance_per_position": [float(x) / drafts for x in accepted]
        if drafts
        else [],
        "output_identical": None
        if rounds[0]["temperature"]
        else float(np.mean([a["token_ids"] == b["token_ids"] for a, b in pairs])),
        "output_ties": sum(race["is_tie"] for race in races),
        "output_gap": max((race["gap"] for race in races), default=None),
        "distinct_4grams": float(
            np.mean([_distinct(run["token_ids"]) for run in runs])
        ),
        **_shares([e["profiles"][name] for e in rounds if name in e["profiles"]]),
        **_engine(rounds[-1]["engines"][name]),
    }


def _acceptance_interval(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """95 % of the acceptance lengths of as many prompts, drawn anew from these."""
    names = "acceptance_length_low", "acceptance_length_high"
    counts = np.array(
        [(r["num_drafts"], sum(r["accepted_per_position"])) for r in runs]
    )
    drawn = np.random.default_rng(0).integers(len(runs), size=(RESAMPLES, len(runs)))
    drafts, accepted = counts[drawn].sum(1).T
    if not drafts.all():
        return dict.fromkeys(names)
    ends = np.percentile(1 + accepted / drafts, [2.5, 97.5])
    return dict(zip(names, map(float, ends), strict=True))


def _median(runs: list[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    return float(np.median([of(run) for run in runs]))


def _rate(run: dict[str, Any]) -> float:
    return len(run["token_ids"]) / float(run["seconds"])


def _decode_rate(run: dict[str, Any]) -> float:
    """Of the tokens after the first."""
    return (len(run["token_ids"]) - 1) / float(run["decode_seconds"])


def _percentiles(name: str, values: list[float]) -> dict[str, float | None]:
    names = name, f"{name}_p20", f"{name}_p80"
    if not values:  # no answer has a second token
        return dict.fromkeys(names)
    return dict(
        zip(names, map(float, np.percentile(values, [50, 20, 80])), strict=True)
    )


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

    A difference without a race, as in float32, is a fault. At a temperature, where
    outputs are equal in distribution only, it is blank.
    """
    if row["output_identical"] is None:
        return ""
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
                "temperature",
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
