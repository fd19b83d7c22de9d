"""A table and a figure of what ``benchmarks.training_ablation`` wrote.

python -m benchmarks.training_ablation_report benchmarks/results/training-ablation
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    arms = read(args.folder)
    text = "\n".join(table(arms, key) for key in ("budget", "context", "texts"))
    print(text)
    (args.folder / "table.md").write_text(text, encoding="utf-8")
    draw(arms, args.folder / "acceptance.png")


def table(arms: dict[str, list[list[dict[str, Any]]]], key: str) -> str:
    """A line for each arm, with the range over its seeds; columns by ``key``."""
    temperatures, values = (values_of(arms, each) for each in ("temperature", key))
    columns = [f"T={t:g}, {key} {value}" for t in temperatures for value in values]
    lines = [f"| arm | seeds | {' | '.join(columns)} |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for name, runs in arms.items():
        cells = []
        for temperature in temperatures:
            for value in values:
                wanted = {"temperature": temperature, key: value}
                each = [acceptance([run], **wanted) for run in runs]
                low, high = f"{min(each):.2f}", f"{max(each):.2f}"
                spread = f" ({low} to {high})" if len(runs) > 1 else ""
                cells.append(f"{acceptance(runs, **wanted):.2f}{spread}")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def values_of(arms: dict[str, list[list[dict[str, Any]]]], key: str) -> list[Any]:
    return sorted({row[key] for runs in arms.values() for run in runs for row in run})


def read(folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Rows of every seed, by arm; the drafter that all arms began with is "before"."""
    arms = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if "results" not in document:
            continue
        arm = document["arm"]
        name = "before"
        if arm:
            source = "books" if arm["data"] == ["books"] else "on-policy"
            matched = " at its temperature" if arm.get("matches_temperature") else ""
            name = f"{arm['views']}, {arm['objective']}, {source}{matched}"
        arms[name].append(document["results"])
    return dict(arms)


def acceptance(runs: list[list[dict[str, Any]]], **wanted: Any) -> float:
    """Geometric mean of the acceptance lengths of the rows with the wanted values."""
    return math.exp(
        mean(
            math.log(row["acceptance_length"])
            for run in runs
            for row in run
            if all(row[key] == value for key, value in wanted.items())
        )
    )


def draw(arms: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    temperatures, budgets = (values_of(arms, key) for key in ("temperature", "budget"))
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=(5.5 * len(temperatures), 4), squeeze=False
    )
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        for name, runs in arms.items():
            lengths = [
                acceptance(runs, temperature=temperature, budget=budget)
                for budget in budgets
            ]
            style = "--" if name == "before" else "-"
            panel.plot(budgets, lengths, style, marker="o", markersize=3, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, budgets)
        panel.set_xlabel("KV budget (tokens)")
        panel.set_ylabel("acceptance length")
        panel.set_title(f"temperature {temperature:g}")
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
