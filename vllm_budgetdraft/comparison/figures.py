"""Figures of a comparison, as SVG to put into a page."""

import io
import math
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "budgetdraft",  # the same file for the same numbers
}
#: Of the kinds of methods, told apart by people who do not see red and green.
COLOURS = {
    "vllm": "#8a8f98",
    "vllm_sync": "#5b6675",
    "ngram": "#e69f00",
    "suffix": "#cc79a7",
    "draft_model": "#56b4e9",
    "budgetdraft": "#0072b2",
}
PART_COLOURS = {"draft": "#0072b2", "verify": "#e69f00", "rest": "#c7cbd1"}
MOST_ACROSS = 4

Rows = list[dict[str, Any]]


def all_figures(rows: Rows, best: Rows, served: Rows) -> list[tuple[str, str]]:
    """Titles and SVG; what has only one value on its axis is left out.

    Args:
        best: the rows with each method's best draft length.
        served: rows by concurrency.
    """
    found = [
        ("Speed-up over plain vLLM, prompt included", speedups(best)),
        ("Speed-up after the first token", _bars(best, "decode_speedup")),
    ]
    for key, label in (
        ("kv_budget", "KV budget (tokens)"),
        ("context_tokens", "context (tokens)"),
        ("num_speculative_tokens", "draft tokens k"),
    ):
        some = rows if key == "num_speculative_tokens" else best
        if len({row[key] for row in some if row[key]}) > 1:
            for value, title in (
                ("decode_speedup", "Speed-up after the first token"),
                ("acceptance_length", "Acceptance length"),
            ):
                found.append((f"{title} by {label}", _lines(some, key, value, label)))
    found.append(("Share of drafts accepted, by position", _positions(best)))
    if any(row["draft_share"] is not None for row in best):
        found.append(("Where the time goes after the first token", _split(best)))
    if served:
        svg = _lines(served, "max_concurrency", "output_throughput", "concurrency")
        found.append(("Output tokens per second by concurrency", svg))
    return found


def speedups(best: Rows) -> str:
    """Of whole requests, by context."""
    return _bars(best, "speedup")


def at_longest(rows: Rows) -> Rows:
    """Rows at the longest context of their task."""
    longest: dict[str, int] = {}
    for row in rows:
        known = longest.get(row["task"], 0)
        longest[row["task"]] = max(known, row["context_tokens"])
    return [row for row in rows if row["context_tokens"] == longest[row["task"]]]


def _panels(rows: Rows, draw: Callable[[Any, Rows], None], **size: float) -> str:
    """A panel for each task, as the rows name it."""
    tasks = sorted({row["task"] for row in rows})
    across = min(MOST_ACROSS, len(tasks))
    down = math.ceil(len(tasks) / across)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            down,
            across,
            figsize=(4.6 * across, size.get("height", 3.2) * down),
            squeeze=False,
            sharey=True,
        )
        for panel, task in zip(panels.flat, tasks, strict=False):
            draw(panel, [row for row in rows if row["task"] == task])
            panel.set_title(task, fontsize=10)
        for panel in panels.flat[len(tasks) :]:
            panel.remove()
        handles, labels = panels[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(
                handles,
                labels,
                loc="outside lower center",
                ncols=min(4, len(labels)),
                frameon=False,
            )
        figure.set_layout_engine("constrained")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _bars(rows: Rows, value: str) -> str:
    labels = list(dict.fromkeys(map(label_of, rows)))

    def draw(panel: Any, some: Rows) -> None:
        contexts = sorted({row["context_tokens"] for row in some})
        some = [row for row in some if row[value] is not None]
        width = 0.84 / len(labels)
        for i, label in enumerate(labels):
            mine = [row for row in some if label_of(row) == label]
            places = [
                contexts.index(row["context_tokens"]) + (i + 0.5) * width - 0.42
                for row in mine
            ]
            heights = [row[value] for row in mine]
            spread = [
                [row[value] - row[f"{value}_p20"] for row in mine],
                [row[f"{value}_p80"] - row[value] for row in mine],
            ]
            panel.bar(
                places,
                heights,
                width * 0.92,
                yerr=spread,
                label=label,
                error_kw={"elinewidth": 0.8, "ecolor": "#444"},
                **_look(mine[0] if mine else {}, i),
            )
        panel.axhline(1, color="#444", linewidth=0.8)
        panel.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts])
        panel.set_xlabel("context (tokens)")
        panel.set_ylabel("speed-up")

    return _panels(rows, draw)


def _lines(rows: Rows, key: str, value: str, label: str) -> str:
    """Of every setting but ``key``; at the longest context, unless that is the key."""
    if key not in ("context_tokens", "max_concurrency"):
        rows = at_longest(rows)
        label += ", longest context"

    def draw(panel: Any, some: Rows) -> None:
        lines: dict[str, Rows] = {}
        for row in some:
            if row[key] and row[value] is not None:
                lines.setdefault(_name_without(row, key), []).append(row)
        for i, (name, points) in enumerate(lines.items()):
            points.sort(key=lambda row: row[key])
            panel.plot(
                [row[key] for row in points],
                [row[value] for row in points],
                marker="o",
                markersize=3.5,
                label=name,
                color=COLOURS[points[0]["kind"]],
                alpha=1 - 0.18 * (i % 5),
                linestyle=("-", "--", ":", "-.")[i % 4],
            )
        ticks = sorted({row[key] for row in some if row[key]})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel(label)

    return _panels(rows, draw, height=3.8)


def _positions(rows: Rows) -> str:
    def draw(panel: Any, some: Rows) -> None:
        for i, row in enumerate(at_longest(some)):
            if row["acceptance_per_position"]:
                rates = row["acceptance_per_position"]
                panel.plot(
                    range(1, 1 + len(rates)),
                    rates,
                    marker="o",
                    markersize=3,
                    label=label_of(row),
                    color=COLOURS[row["kind"]],
                    alpha=1 - 0.12 * (i % 5),
                )
        panel.set_ylim(0, 1)
        panel.set_xlabel("position in the draft, longest context")
        panel.set_ylabel("accepted")

    return _panels(rows, draw)


def _split(rows: Rows) -> str:
    some = at_longest(rows)
    labels = list(dict.fromkeys(map(label_of, some)))

    def draw(panel: Any, mine: Rows) -> None:
        found = {label_of(row): row for row in mine}
        left = [0.0] * len(labels)
        for part, colour in PART_COLOURS.items():
            shares = [
                (found[label][f"{part}_share"] or 0) if label in found else 0
                for label in labels
            ]
            panel.barh(labels, shares, left=left, label=part, color=colour)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        panel.set_xlim(0, 1)
        panel.invert_yaxis()
        panel.set_xlabel("share of the time, longest context")

    return _panels(some, draw, height=1.2 + 0.32 * len(labels))


def label_of(row: dict[str, Any]) -> str:
    """A method's name without its draft length."""
    return _name_without(row, "num_speculative_tokens")


def _name_without(row: dict[str, Any], key: str) -> str:
    policy, budget = row["eviction_policy"], row["kv_budget"]
    parts = [row["kind"], policy if policy != "chunk_retrieval" else None]
    parts += [f"{budget:,}"] if budget and key != "kv_budget" else []
    return " ".join(filter(None, parts))


def _look(row: dict[str, Any], index: int) -> dict[str, Any]:
    colour = COLOURS.get(row.get("kind", ""), "#000")
    return {"color": colour, "alpha": 1 - 0.15 * (index % 4)}
