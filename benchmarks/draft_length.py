"""Adaptive draft length against every fixed one, and against no speculation at all.

One engine of plain vLLM, one of plain vLLM that schedules as budgetdraft does, one of
budgetdraft whose requests ask for 0, 1, 2, ... drafts, one that adapts, and one that
adapts with a drafter of random weights. They take turns in random order at each batch
size; all go on from the same passages. The first turn at a batch size is reported by
itself: what an engine reaches that has not learnt from steps yet.

    python -m benchmarks.draft_length --output benchmarks/results/draft-length.json

About 20 minutes on 2 CPU cores.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_budgetdraft import provenance
from vllm_budgetdraft.comparison.engine_process import (
    BatchGeneration,
    EngineProcess,
)
from vllm_budgetdraft.comparison.measure import PAUSE_SECONDS, prepare_environment
from vllm_budgetdraft.comparison.prompts import EXCERPT

PLAIN, SYNCHRONOUS = "vllm", "vllm, synchronous"
ADAPTIVE, RANDOM = "adaptive", "adaptive, random drafter"
OTHERS = (PLAIN, SYNCHRONOUS, ADAPTIVE, RANDOM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="models/books-9m")
    parser.add_argument("--drafter", default="models/books-9m-drafter")
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--context-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    args = parser.parse_args()

    prepare_environment()
    document = {"provenance": provenance.collect(vars(args))}
    methods = dict.fromkeys(OTHERS) | {
        f"{length} drafts": length for length in args.lengths
    }
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {
            name: stack.enter_context(EngineProcess(each, folder / f"{name}.log"))
            for name, each in engine_args(args, folder).items()
        }
        for batch_size in args.batch_sizes:
            # Small batches are sooner done, and differ more from run to run.
            repeats = args.repeats * (2 if batch_size < 16 else 1)
            prompts = passages(batch_size, repeats, args)
            runs = measured(engines, methods, prompts, args)
            rows += table(runs, batch_size)
    text = json.dumps({"results": rows, **document}, indent=2)
    Path(args.output).write_text(text + "\n", encoding="utf-8")


def engine_args(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each engine: plain, fixed lengths, adaptive, adaptive with random weights."""
    config = AutoConfig.from_pretrained(args.drafter)
    torch.manual_seed(0)
    random_drafter = folder / "random"
    AutoModelForCausalLM.from_config(config).save_pretrained(random_drafter)
    common = {
        "model": args.target,
        "dtype": "float32",
        "max_model_len": args.context_tokens + args.new_tokens,
        "max_num_seqs": max(args.batch_sizes),
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    ours = {
        "method": "budgetdraft",
        "model": args.drafter,
        "num_speculative_tokens": max(args.lengths),
        "adaptive_draft_length": False,
    }
    adaptive = ours | {"adaptive_draft_length": True}
    configs = {
        PLAIN: None,
        SYNCHRONOUS: None,
        "fixed": ours,
        ADAPTIVE: adaptive,
        RANDOM: adaptive | {"model": str(random_drafter)},
    }
    found = {
        name: common | {"speculative_config": each} for name, each in configs.items()
    }
    found[SYNCHRONOUS]["async_scheduling"] = False
    return found


def measured(
    engines: dict[str, EngineProcess],
    methods: dict[str, int | None],
    turns: list[list[list[int]]],
    args: argparse.Namespace,
) -> dict[str, list[BatchGeneration]]:
    """Runs of each method, on the passages of each turn."""
    runs: dict[str, list[BatchGeneration]] = {name: [] for name in methods}
    rng = random.Random(0)
    for prompts in turns:
        for name in rng.sample(list(methods), len(methods)):
            length = methods[name]
            sampling = {
                "temperature": args.temperature,
                "max_tokens": args.new_tokens,
                "ignore_eos": True,
            }
            if length is not None:
                sampling["extra_args"] = {"num_speculative_tokens": length}
            time.sleep(PAUSE_SECONDS)
            engine = engines[name if length is None else "fixed"]
            run = engine.generate_batch(prompts, sampling)
            runs[name].append(run)
    return runs


def passages(
    batch_size: int, repeats: int, args: argparse.Namespace
) -> list[list[list[int]]]:
    """Of each turn, and a first one, ``batch_size`` passages of the excerpt."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    text = EXCERPT.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    turns = 1 + repeats
    stride = (len(tokens) - args.context_tokens) // (batch_size * turns)
    prompts = [
        tokens[i * stride : i * stride + args.context_tokens]
        for i in range(batch_size * turns)
    ]
    return [prompts[turn::turns] for turn in range(turns)]


def table(
    runs: dict[str, list[BatchGeneration]], batch_size: int
) -> list[dict[str, Any]]:
    """Of each method: medians, and of its ratios to others in the same turn.

    Of the first turn there is the ratio to plain vLLM alone.
    """
    first = {name: each[0].seconds for name, each in runs.items()}
    runs = {name: each[1:] for name, each in runs.items()}

    def ratios_to(base: str, name: str) -> list[float]:
        turns = zip(runs[base], runs[name], strict=True)
        return sorted(other.seconds / mine.seconds for other, mine in turns)

    to_plain = {name: ratios_to(PLAIN, name) for name in runs}
    to_synchronous = {name: ratios_to(SYNCHRONOUS, name) for name in runs}
    fixed = [name for name in runs if name not in OTHERS]
    best = max(fixed, key=lambda name: statistics.median(to_plain[name]))
    print(f"\nbatch {batch_size}; the best fixed length: {best}")
    rows = []
    for name, mine in runs.items():
        outputs = [run.token_ids for run in mine]
        num_tokens = [sum(map(len, each)) for each in outputs]
        speeds = [n / run.seconds for n, run in zip(num_tokens, mine, strict=True)]
        drafted = sum(run.num_draft_tokens for run in mine)
        accepted = sum(run.num_accepted_tokens for run in mine)
        row = {
            "batch_size": batch_size,
            "method": name,
            "output_throughput": statistics.median(speeds),
            "ratio_to_plain": statistics.median(to_plain[name]),
            "quartiles_to_plain": statistics.quantiles(to_plain[name])[::2],
            "ratio_to_synchronous": statistics.median(to_synchronous[name]),
            "first_ratio_to_plain": first[PLAIN] / first[name],
            "ratio_to_best_fixed": statistics.median(ratios_to(best, name)),
            "drafts_per_token": drafted / sum(num_tokens),
            "accepted_per_token": accepted / sum(num_tokens),
            "same_output": outputs == [run.token_ids for run in runs[PLAIN]],
        }
        rows.append(row)
        low, high = row["quartiles_to_plain"]
        print(
            f"{name:<25}{row['output_throughput']:>6.0f} tok/s"
            f"{row['ratio_to_plain']:>6.2f}x plain ({low:.2f} to {high:.2f})"
            f"{row['ratio_to_synchronous']:>6.2f}x sync"
            f"{row['ratio_to_best_fixed']:>6.2f}x best"
            f"{row['first_ratio_to_plain']:>6.2f}x at first"
            f"  drafted {row['drafts_per_token']:.2f}"
            f"  accepted {row['accepted_per_token']:.2f}  same {row['same_output']}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
