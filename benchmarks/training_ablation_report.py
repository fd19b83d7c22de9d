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
    temperatures, budgets = (
        sorted({row[key] for runs in arms.values() for run in runs for row in run})
        for key in ("temperature", "budget")
    )
    lines = [
        "| arm | seeds | "
        + " | ".join(f"T={t:g}, budget {b}" for t in temperatures for b in budgets)
        + " |",
        "|---" * (2 + len(temperatures) * len(budgets)) + "|",
    ]
    for name, runs in arms.items():
        cells = [
            f"{acceptance(runs, temperature=t, budget=b):.2f}"
            for t in temperatures
            for b in budgets
        ]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    (args.folder / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(arms, temperatures, budgets, args.folder / "acceptance.png")


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
    """Geometric mean of acceptance lengths over seeds, texts and contexts."""
    return math.exp(
        mean(
            math.log(row["acceptance_length"])
            for run in runs
            for row in run
            if all(row[key] == value for key, value in wanted.items())
        )
    )


def draw(
    arms: dict[str, list[list[dict[str, Any]]]],
    temperatures: list[float],
    budgets: list[int],
    path: Path,
) -> None:
    import matplotlib.pyplot as plt

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
