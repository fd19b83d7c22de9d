r"""FlexDraft: acceptance by training, and the time of a round by mode and batch size.

    python -m benchmarks.flexdraft --texts held-out.jsonl --output results/flexdraft \
        acceptance --drafters tuned calibrated multi-view another-drafter
    python -m benchmarks.flexdraft --texts held-out.jsonl --output results/flexdraft \
        rounds --drafter calibrated

The first measures any drafter's folder with the draft loop of ``--eval_strategy``, a
separate model too; the second decodes passages in turns. Minutes each, on 2 CPU cores.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_budgetdraft import provenance
from vllm_budgetdraft.attention.backend import default_device
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.evaluation.acceptance import HeldOutAcceptance, passages
from vllm_budgetdraft.evaluation.flexdraft_acceptance import FlexDraftAcceptance
from vllm_budgetdraft.flexdraft.checkpoint import is_flexdraft, load_flexdraft
from vllm_budgetdraft.flexdraft.decoding import FlexDecoder, ModeSwitch
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.flexdraft.switch import MODES, Mode
from vllm_budgetdraft.training.sources import read_texts

NUM_DRAFTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="models/books-9m")
    parser.add_argument("--texts", nargs="+", required=True, help="held out")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--local-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    commands = parser.add_subparsers(required=True)

    acceptance = commands.add_parser("acceptance")
    acceptance.add_argument("--drafters", nargs="+", required=True)
    acceptance.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    acceptance.add_argument("--budgets", type=int, nargs="+", default=[128, 512, 8192])
    acceptance.add_argument("--prompts", type=int, default=6, help="of each context")
    acceptance.set_defaults(run=measure_acceptance)

    rounds = commands.add_parser("rounds")
    rounds.add_argument("--drafter", required=True)
    rounds.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    rounds.add_argument("--context", type=int, default=1024)
    rounds.add_argument("--kv-budget", type=int, default=512)
    rounds.add_argument("--repeats", type=int, default=5)
    rounds.set_defaults(run=measure_rounds)

    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    texts = read_texts(args.texts, tokenizer, unwraps_lines=True)
    args.run(args, target.eval().to(default_device()), texts)


def measure_acceptance(args: argparse.Namespace, target: Any, texts: Any) -> None:
    """acceptance.json, and acceptance.svg with the means over contexts.

    Drafters whose names are in that file already are not measured again.
    """
    settings = {
        "num_speculative_tokens": NUM_DRAFTS,
        "local_tokens": args.local_tokens,
    }
    prompts = {each: passages(texts, each, args.prompts, 0) for each in args.contexts}
    arguments: dict[str, Any] = {
        "budgets": args.budgets,
        "temperatures": [0.0, 1.0],
        "new_tokens": args.new_tokens,
        "settings": settings,
    }
    path = args.output / "acceptance.json"
    rows = json.loads(path.read_text())["results"] if path.is_file() else []
    known = {row["drafter"] for row in rows}
    for folder in args.drafters:
        if Path(folder).name in known:
            continue
        held_out = HeldOutAcceptance(target, prompts, **arguments)
        if is_flexdraft(folder):
            held_out = FlexDraftAcceptance(
                target, prompts, page_size=args.page_size, **arguments
            )
        for row in held_out.rows(Path(folder)):
            found = {"drafter": Path(folder).name, **vars(row)}
            rows.append(found)
            print(found, flush=True)
    write(args, "acceptance", rows)
    draw(rows, args.output / "acceptance.svg")


def measure_rounds(args: argparse.Namespace, target: Any, texts: Any) -> None:
    """rounds.json: seconds of a round in each mode, in turns, and what is chosen."""
    drafter = load_flexdraft(
        args.drafter, target, max_positions=args.context + args.new_tokens + 64
    )
    settings = EvictionSettings(local_tokens=args.local_tokens)
    selector = PageSelector(settings, args.page_size)
    rows = []
    for size in args.batch_sizes:
        decoder = FlexDecoder(
            target,
            drafter,
            num_drafts=NUM_DRAFTS,
            selector=selector,
            kv_budget=args.kv_budget,
        )
        prompts = passages(texts, args.context, size, seed=0)
        decoder.generate(prompts, NUM_DRAFTS, mode="parallel")  # warms up
        decoder.switch = ModeSwitch()
        medians: dict[Mode, list[float]] = {mode: [] for mode in MODES}
        for repeat in range(args.repeats):
            for mode in MODES[:: 1 if repeat % 2 else -1]:
                before = len(decoder.switch.seconds[size, mode])
                decoder.generate(prompts, args.new_tokens, mode=mode)
                some = decoder.switch.seconds[size, mode][before:]
                medians[mode].append(statistics.median(some))
        accepted = [count for row in decoder.accepted for count in row]
        row = {
            "batch_size": size,
            **{f"{mode}_seconds": statistics.median(medians[mode]) for mode in MODES},
            "chosen": decoder.switch.choose(size),
            "acceptance_length": 1 + statistics.mean(accepted),
        }
        rows.append(row)
        print(row, flush=True)
    write(args, "rounds", rows)


def write(args: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> None:
    settings = {k: str(v) for k, v in vars(args).items() if not callable(v)}
    document = {"results": rows, "provenance": provenance.collect(settings)}
    text = json.dumps(document, indent=2) + "\n"
    (args.output / f"{name}.json").write_text(text, encoding="utf-8")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Acceptance length by budget, a panel for each temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    budgets = sorted({row["budget"] for row in rows})
    panels = figure.subplots(1, 2, sharey=True)
    for panel, temperature in zip(panels, (0.0, 1.0), strict=True):
        for place, drafter in enumerate(drafters):
            heights = [
                statistics.mean(
                    row["acceptance_length"]
                    for row in rows
                    if (row["drafter"], row["budget"], row["temperature"])
                    == (drafter, budget, temperature)
                )
                for budget in budgets
            ]
            width = 0.8 / len(drafters)
            places = [index + place * width for index in range(len(budgets))]
            panel.bar(places, heights, width, label=drafter)
        centre = 0.4 - 0.4 / len(drafters)
        panel.set_xticks([index + centre for index in range(len(budgets))], budgets)
        panel.set_xlabel("KV budget (tokens)")
        panel.set_title(f"temperature {temperature:g}")
    panels[0].set_ylabel("acceptance length")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path)


if __name__ == "__main__":
    main()
