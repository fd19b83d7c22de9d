"""Which views, objectives and data make drafters that keep their acceptance.

Every arm goes on from the same drafter, with the same number of steps and tokens. Then
acceptance is measured with the real draft loop, by budget, context and temperature, on
held-out books, on meetings, and on lists of facts that are asked for again.

    budgetdraft generate --target models/books-9m --texts 'books/train-*.jsonl.xz' \
        --unwrap-lines --prompts 1024:512 3840:512 --top-logprobs 32 \
        --output data/greedy
    budgetdraft generate ... --temperature 1 --seed 1 --output data/sampled
    budgetdraft generate ... --teacher-forced --seed 2 --output data/books
    python -m benchmarks.training_ablation --data data \
        --held-out books='books/validation.jsonl.xz' meetings='qmsum/test.jsonl.xz' \
        --output benchmarks/results/training-ablation

A few hours on 2 CPU cores; it goes on where it stopped. Several processes with
different ``--arms`` may share the folders. ``--drafter models/books-9m-drafter`` asks
the same of a drafter that is trained already.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_budgetdraft import provenance
from vllm_budgetdraft.evaluation.acceptance import HeldOutAcceptance, passages
from vllm_budgetdraft.training.sources import read_texts

VIEWS = {
    "full": ["--sparse_weight", "0"],
    "single": ["--budgets", "512", "--budget_weights", "1"],
    "multi": ["--budgets", "64", "128", "256", "512", "1024", "--budget_weights"]
    + ["0.3", "0.2", "0.2", "0.2", "0.1"],
}
#: Text columns of the held-out sets.
COLUMNS = {"books": "text", "meetings": "context"}
LOCAL_TOKENS = 32


@dataclass(frozen=True)
class Arm:
    """What is trained; ``data`` are folders of stored continuations."""

    views: str
    objective: str
    data: tuple[str, ...]
    seed: int = 0
    matches_temperature: bool = False

    @property
    def name(self) -> str:
        matched = "_matched" if self.matches_temperature else ""
        data = "+".join(self.data)
        return f"{self.views}-{self.objective}{matched}-{data}-{self.seed}"


ON_POLICY, BOOKS = ("greedy", "sampled"), ("books",)
#: A fraction of the grid: one factor at a time around multi-budget views on-policy, and
#: seeds for what decides.
ARMS = [
    Arm("full", "ce", ON_POLICY),
    Arm("multi", "ce", ON_POLICY),
    Arm("multi", "lk_hybrid", ON_POLICY),
    Arm("single", "ce", ON_POLICY),
    Arm("multi", "kl", ON_POLICY),
    Arm("multi", "lk_alpha", ON_POLICY),
    Arm("multi", "ce", BOOKS),
    Arm("multi", "lk_hybrid", BOOKS),
    Arm("full", "lk_hybrid", ON_POLICY),
    Arm("multi", "kl", ON_POLICY, matches_temperature=True),
    Arm("multi", "lk_hybrid", ON_POLICY, matches_temperature=True),
    *(
        Arm(views, objective, ON_POLICY, seed)
        for seed in (1, 2)
        for views, objective in (
            ("full", "ce"),
            ("single", "ce"),
            ("multi", "ce"),
            ("multi", "lk_hybrid"),
        )
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="models/books-9m")
    parser.add_argument("--drafter", default="models/books-9m-native512")
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", nargs="+", required=True, metavar="NAME=FILES")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prefix-tokens", type=int, nargs="+", default=[1024, 3840])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--arms", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--work", default="ablation", help="folder of the drafters")
    args = parser.parse_args()

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    held_out: dict[str, HeldOutAcceptance] = {}
    for arm in [None, *ARMS]:
        name = arm.name if arm else "before"
        path = output / f"{name}.json"
        if path.is_file() or not any(fnmatch(name, each) for each in args.arms):
            continue
        begun = provenance.collect(vars(args))
        start = time.perf_counter()
        drafter = train(arm, args) if arm else Path(args.drafter)
        trained = time.perf_counter()
        held_out = held_out or measures(args, output)
        rows = [
            {"texts": texts, **dataclasses.asdict(row)}
            for texts, measure in held_out.items()
            for row in measure.rows(drafter)
        ]
        document = {
            "arm": dataclasses.asdict(arm) if arm else None,
            "train_seconds": trained - start,
            "eval_seconds": time.perf_counter() - trained,
            "results": rows,
            "provenance": begun,
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        lengths = torch.tensor([row["acceptance_length"] for row in rows])
        print(
            f"{name:<40} {lengths.log().mean().exp():.3f} mean acceptance length, "
            f"{trained - start:.0f} s training",
            flush=True,
        )


def train(arm: Arm, args: argparse.Namespace) -> Path:
    """The drafter's folder; one that is there already is only measured again."""
    folder = Path(args.work) / arm.name
    if (folder / "README.md").is_file():  # which is written last
        return folder
    command = [
        *(sys.executable, "-m", "vllm_budgetdraft.training"),
        *("--target", args.target, "--drafter", args.drafter),
        *("--continuations", *(f"{args.data}/{name}" for name in arm.data)),
        *("--objective", arm.objective, *VIEWS[arm.views]),
        *("--match_temperature", str(arm.matches_temperature)),
        *("--local_tokens", str(LOCAL_TOKENS)),
        *("--prefix_tokens", *map(str, args.prefix_tokens)),
        *("--continuation_tokens", "256"),
        *("--per_device_train_batch_size", str(args.batch_size)),
        *("--max_steps", str(args.steps), "--seed", str(arm.seed)),
        *("--learning_rate", str(args.learning_rate), "--warmup_steps", "10"),
        *("--lr_scheduler_type", "cosine", "--weight_decay", "0.01"),
        *("--logging_steps", "20", "--save_strategy", "no"),
        *("--report_to", "none", "--disable_tqdm", "true"),
        *("--bf16", "true", "--use_cpu", "--output_dir", str(folder)),
    ]
    if arm.objective != "ce":  # which needs no more than was stored
        cache = Path(args.work) / f"teacher-{'+'.join(arm.data)}-{arm.seed}"
        command += ["--teacher", "live", "--teacher_cache", str(cache)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{arm.name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return folder


def measures(args: argparse.Namespace, output: Path) -> dict[str, HeldOutAcceptance]:
    """By set of texts; says also how much each depends on what is far away."""
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    longest = max(args.contexts)
    texts: dict[str, Any] = {"facts": facts(tokenizer, longest)}
    for each in args.held_out:
        name, _, files = each.partition("=")
        texts[name] = read_texts(
            [files],
            tokenizer,
            column=COLUMNS.get(name, "text"),
            unwraps_lines=name == "books",
        )
    far = {
        name: far_context_dependence(target, passages(rows, longest, args.prompts, 0))
        for name, rows in texts.items()
    }
    (output / "far_context.json").write_text(json.dumps(far, indent=1) + "\n")
    print("next tokens that depend on the far context:", far, flush=True)
    return {
        name: HeldOutAcceptance(
            target,
            {each: passages(rows, each, args.prompts, 0) for each in args.contexts},
            budgets=args.budgets,
            temperatures=args.temperatures,
            new_tokens=args.new_tokens,
            settings={"num_speculative_tokens": 8, "local_tokens": LOCAL_TOKENS},
        )
        for name, rows in texts.items()
    }


def facts(tokenizer: Any, num_tokens: int) -> datasets.Dataset:
    """Who lives where, a long list of it, and the same list again in another order."""
    first = "Anna Boris Clara David Edith Frank Grace Henry Irene Jacob Laura Martin"
    last = "Abbott Barnes Carter Dalton Ellis Foster Graham Harper Irving Jordan Kemp"
    towns = "Ashford Bristol Chester Dover Exeter Fulham Hastings Ipswich".split()
    rows = []
    for seed in range(16):
        rng = Random(seed)
        people = [
            f"{a} {b} lived at {rng.choice(towns)}, number {rng.randint(2, 99)}."
            for a in first.split()
            for b in last.split()
        ]
        text = ""
        while len(tokenizer(text)["input_ids"]) < 2 * num_tokens:
            rng.shuffle(people)
            text += " ".join(people) + "\n\n"
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return datasets.Dataset.from_dict({"input_ids": rows})


@torch.no_grad()
def far_context_dependence(
    target: Any, contexts: list[list[int]], near: tuple[int, ...] = (128, 512)
) -> dict[str, float]:
    """Share of the last 64 next-token choices that change if only so many are seen."""
    changed = {f"argmax_changes_within_{size}": 0.0 for size in near}
    last = 64
    for context in contexts:
        tokens = torch.tensor([context])
        whole = target(tokens, logits_to_keep=last).logits[0].argmax(-1)
        for size in near:
            windows = torch.stack(
                [
                    tokens[0, i + 1 - size : i + 1]
                    for i in range(len(context) - last, len(context))
                ]
            )
            few = target(windows, logits_to_keep=1).logits[:, 0].argmax(-1)
            share = (few != whole).float().mean().item()
            changed[f"argmax_changes_within_{size}"] += share / len(contexts)
    return changed


if __name__ == "__main__":
    main()
