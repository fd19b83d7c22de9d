"""What a draft vocabulary costs and brings, by its size.

Of one drafter, whose folder has a ``draft_vocabulary.st`` of all its tokens:
how much of its target's own answers each size covers, the acceptance length on the same
prompts, the time of a draft, the memory of the weights, and tokens per second in vLLM,
where engines of all sizes take turns with plain vLLM's.

    budgetdraft vocabulary DRAFTER --target TARGET --continuations FILE --size 49152
    python -m benchmarks.draft_vocabulary --target TARGET --drafter DRAFTER \\
        --data chat=benchmarks/results/chat/questions.jsonl --output results.json

About an hour for SmolLM2-135M on 2 CPU cores.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_budgetdraft import provenance
from vllm_budgetdraft.comparison.engine_process import EngineProcess
from vllm_budgetdraft.comparison.measure import PAUSE_SECONDS, prepare_environment
from vllm_budgetdraft.comparison.prompts import build_prompts
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.drafter.packing import weight_bytes
from vllm_budgetdraft.evaluation.acceptance import AcceptanceRow, HeldOutAcceptance
from vllm_budgetdraft.proposer.building import build_proposer
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH

PLAIN = "vllm"
#: What is timed of drafts: requests at once, and tokens that each has read.
BATCH_SIZES, CONTEXT_TOKENS = (1, 4, 8), 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--data", nargs="+", required=True, metavar="TASK=SOURCE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[4096, 8192, 16384, 32768, 0],
        help="0 is the whole vocabulary",
    )
    parser.add_argument(
        "--speed-sizes", type=int, nargs="+", default=[4096, 8192, 16384, 0]
    )
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=20, help="of each task")
    parser.add_argument(
        "--speed-prompts", type=int, default=10, help="of these, that speed is of"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--kv-budget", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=40, help="of a draft")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="to be measured; those that the output has already stay there",
    )
    args = parser.parse_args()
    if 0 not in args.speed_sizes:
        parser.error("--speed-sizes lacks 0, which the others are compared with")

    prepare_environment()
    prompts: dict[int | str, list[list[int]]] = {}
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    for prompt in build_prompts(
        tokenizer,
        dict(each.split("=", 1) for each in args.data),
        lengths=[args.context_tokens],
        count=args.prompts,
        unwraps_lines=True,
        uses_template=True,
    ):
        prompts.setdefault(prompt.task, []).append(prompt.token_ids)
    document: dict[str, Any] = {"provenance": {}}
    if args.output.is_file():
        document = json.loads(args.output.read_text(encoding="utf-8"))
    for part in args.parts:
        begun = provenance.collect({**vars(args), "output": str(args.output)})
        document[part] = PARTS[part](args, prompts)
        document["provenance"][part] = begun
        if part == "speed":
            document = best_of(document[part]) | document
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1)
        args.output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in document.items() if "best" in k}))


def draft_times(
    args: argparse.Namespace, prompts: dict[int | str, list[list[int]]]
) -> list[dict[str, Any]]:
    """Medians of drafts of the longest length, by size, batch and temperature."""
    num_drafts, proposers = max(args.lengths), {}
    generator = torch.Generator().manual_seed(0)
    for size in args.sizes:
        config = BudgetDraftConfig(
            model=args.drafter,
            num_speculative_tokens=num_drafts,
            kv_budget=args.kv_budget,
            draft_vocabulary_size=size,
        )
        proposer = proposers[size] = build_proposer(
            config,
            num_slots=max(BATCH_SIZES),
            max_model_len=2 * CONTEXT_TOKENS,
            dtype=torch.float32,
            device="cpu",
        )
        vocab_size = proposer.drafter.config.vocab_size
        for slot in range(max(BATCH_SIZES)):
            tokens = torch.randint(vocab_size, (CONTEXT_TOKENS,), generator=generator)
            proposer.start_request(slot)
            proposer.ingest(slot, tokens)
    rows = []
    for batch in BATCH_SIZES:
        slots = torch.arange(batch)
        tokens = torch.randint(1000, (batch, FIRST_WIDTH), generator=generator)
        ends = torch.full((batch,), CONTEXT_TOKENS + FIRST_WIDTH)
        for temperatures in (None, torch.ones(batch)):
            times: dict[int, list[float]] = {size: [] for size in args.sizes}
            for _ in range(args.repeats):
                for size, proposer in proposers.items():
                    begun = time.perf_counter()
                    proposer.draft(slots, tokens, ends, num_drafts, temperatures)
                    times[size].append(time.perf_counter() - begun)
            for size, proposer in proposers.items():
                drafter = proposer.drafter
                row = {
                    "size": size,
                    "batch_size": batch,
                    "num_drafts": num_drafts,
                    "is_drawn": temperatures is not None,
                    "milliseconds": 1000 * statistics.median(times[size]),
                    "weight_bytes": weight_bytes(
                        drafter.config,
                        torch.float32,
                        drafter.is_packed,
                        drafter.draft_ids,
                    ),
                }
                print(row, flush=True)
                rows.append(row)
    return rows


def acceptance(
    args: argparse.Namespace, prompts: dict[int | str, list[list[int]]]
) -> list[dict[str, Any]]:
    """Acceptance lengths by size, task and temperature, and what sizes cover."""
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    ends = target.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    rows = []
    measure = HeldOutAcceptance(
        target,
        prompts,
        budgets=[args.kv_budget],
        temperatures=args.temperatures,
        new_tokens=args.new_tokens,
        settings={"num_speculative_tokens": max(args.lengths)},
        end_tokens=ends,
    )
    for size in args.sizes:
        measure.settings["draft_vocabulary_size"] = size
        found: list[AcceptanceRow] = measure.rows(Path(args.drafter))
        for each in found:
            row = {
                "size": size,
                "task": each.context,
                "temperature": each.temperature,
                "acceptance_length": each.acceptance_length,
                "coverage": coverage(args, size, measure.answers(each.context)),
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def coverage(args: argparse.Namespace, size: int, answers: list[list[int]]) -> float:
    """The share of some tokens that a draft vocabulary has."""
    proposer = build_proposer(
        BudgetDraftConfig(
            model=args.drafter, num_speculative_tokens=1, draft_vocabulary_size=size
        ),
        num_slots=1,
        max_model_len=CONTEXT_TOKENS,
        dtype=torch.float32,
        device="cpu",
    )
    if (ids := proposer.drafter.draft_ids) is None:
        return 1.0
    tokens = torch.tensor([token for answer in answers for token in answer])
    return torch.isin(tokens, ids).float().mean().item()


def speed(
    args: argparse.Namespace, prompts: dict[int | str, list[list[int]]]
) -> list[dict[str, Any]]:
    """Tokens per second of one request at a time, by size, length and temperature.

    Of prompts that the target's prefix cache has: the drafter reads them even so.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {
            name: stack.enter_context(EngineProcess(each, folder / f"{name}.log"))
            for name, each in engine_args(args, prompts).items()
        }
        turns = [
            (temperature, task, prompt)
            for temperature in args.temperatures
            for task, some in prompts.items()
            for prompt in some[: args.speed_prompts]
        ]
        methods: list[tuple[int | str, int]] = [(PLAIN, 0)]
        methods += itertools.product(args.speed_sizes, args.lengths)
        rng = random.Random(0)
        runs: list[dict[str, Any]] = []
        for turn, (temperature, task, prompt) in enumerate(turns):
            for engine in engines.values():  # from now on its cache has the prompt
                engine.generate(prompt, {"max_tokens": 1})
            for size, length in rng.sample(methods, len(methods)):
                sampling = {"temperature": temperature, "max_tokens": args.new_tokens}
                if length:
                    sampling["extra_args"] = {"num_speculative_tokens": length}
                time.sleep(PAUSE_SECONDS)
                run = engines[str(size)].generate(prompt, sampling)
                runs.append(
                    {
                        "turn": turn,
                        "task": task,
                        "temperature": temperature,
                        "size": size,
                        "length": length,
                        "tokens": len(run.token_ids),
                        "seconds": run.seconds,
                        "decode_seconds": run.decode_seconds,
                        "steps": run.num_drafts,
                        "accepted": sum(run.accepted_per_position),
                        "token_ids": run.token_ids,
                    }
                )
            print(f"turn {turn + 1} of {len(turns)}", flush=True)
    return summary(args, runs)


def engine_args(
    args: argparse.Namespace, prompts: dict[int | str, list[list[int]]]
) -> dict[str, dict[str, Any]]:
    """Plain vLLM's, and one for each size."""
    longest = max(len(each) for some in prompts.values() for each in some)
    common = {
        "model": args.target,
        "dtype": "float32",
        "max_model_len": longest + args.new_tokens,
        "max_num_seqs": 8,
        "enforce_eager": True,
    }
    found = {PLAIN: common}
    for size in args.speed_sizes:
        config = {
            "method": "budgetdraft",
            "model": args.drafter,
            "num_speculative_tokens": max(args.lengths),
            "kv_budget": args.kv_budget,
            "adaptive_draft_length": False,
            "draft_vocabulary_size": size,
        }
        found[str(size)] = common | {"speculative_config": config}
    return found


def summary(
    args: argparse.Namespace, runs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Of each task, temperature, size and length: medians over turns of ratios."""
    by_turn: dict[Any, dict[str, Any]] = {
        (run["turn"], run["size"], run["length"]): run for run in runs
    }
    cells = sorted({(r["task"], r["temperature"]) for r in runs})
    rows = []
    for task, temperature in cells:
        turns = sorted(
            {
                run["turn"]
                for run in runs
                if (run["task"], run["temperature"]) == (task, temperature)
            }
        )
        for size in args.speed_sizes:
            for length in args.lengths:
                mine = [by_turn[turn, size, length] for turn in turns]
                plain = [by_turn[turn, PLAIN, 0] for turn in turns]
                whole = [by_turn[turn, 0, length] for turn in turns]
                steps = sum(run["steps"] for run in mine)
                row = {
                    "task": task,
                    "temperature": temperature,
                    "size": size,
                    "num_drafts": length,
                    "speed_over_plain": _over(mine, plain),
                    "speed_over_full_head": _over(mine, whole),
                    "tokens_per_second": statistics.median(map(_speed, mine)),
                    "acceptance_length": 1
                    + sum(run["accepted"] for run in mine) / max(1, steps),
                    "output_identical": temperature == 0
                    and all(
                        a["token_ids"] == b["token_ids"]
                        for a, b in zip(mine, plain, strict=True)
                    ),
                }
                print(row, flush=True)
                rows.append(row)
    return rows


def _speed(run: dict[str, Any]) -> float:
    """Tokens per second: at a temperature, answers are not equally long."""
    return run["tokens"] / run["seconds"]


def _over(mine: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    pairs = zip(mine, others, strict=True)
    return statistics.median(_speed(a) / _speed(b) for a, b in pairs)


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The size that is fastest, each at its best length, and how it compares.

    Of all tasks and temperatures together, by the geometric mean of speed over plain
    vLLM's; against the whole vocabulary at its own best length.
    """
    found: dict[int, tuple[float, int]] = {}
    for size in {row["size"] for row in rows}:
        for length in {row["num_drafts"] for row in rows}:
            speeds = [
                row["speed_over_plain"]
                for row in rows
                if (row["size"], row["num_drafts"]) == (size, length)
            ]
            mean = statistics.geometric_mean(speeds)
            found[size] = max(found.get(size, (0.0, 0)), (mean, length))
    best = max(found, key=lambda size: found[size])
    return {
        "best_size": best,
        "best_num_drafts": found[best][1],
        "best_speed_over_plain": found[best][0],
        "best_speed_over_full_head": found[best][0] / found[0][0],
        "speed_over_plain_by_size": {str(k): v[0] for k, v in sorted(found.items())},
    }


PARTS = {"drafts": draft_times, "acceptance": acceptance, "speed": speed}

if __name__ == "__main__":
    main()
