r"""Decoding speed of many long requests at once, by method.

    python -m benchmarks.batched_decoding --target TARGET --drafter DRAFTER \
        --texts held-out.jsonl --context-tokens 16384 --batch-sizes 16 32 --output FILE

Each method is an engine of its own. They take turns, and each speed-up is of two runs
of the same turn; where memory has no room for all of them, one goes after the other.
The time of prompts is that of the same requests with one new token, and is taken off.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_budgetdraft import provenance
from vllm_budgetdraft.comparison.engine_process import BatchGeneration, preload
from vllm_budgetdraft.comparison.engines import running, together_or_in_turn
from vllm_budgetdraft.comparison.measure import prepare_environment, take_turns
from vllm_budgetdraft.comparison.methods import PLAIN, Method, all_methods
from vllm_budgetdraft.comparison.prompts import build_prompts
from vllm_budgetdraft.comparison.room import memory_at_hand

#: By method: a turn's requests with one new token, and with all.
Turns = dict[str, list[tuple[BatchGeneration, BatchGeneration]]]
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--methods", nargs="+", default=["vllm", "draft_model", "budgetdraft"]
    )
    parser.add_argument("--context-tokens", type=int, default=16384)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--kv-budget", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine-args", type=json.loads, default={})
    args = parser.parse_args()
    prepare_environment()
    preload()
    prompts = build_prompts(
        AutoTokenizer.from_pretrained(args.target),
        {"books": args.texts},
        lengths=[args.context_tokens],
        count=max(args.batch_sizes),
        unwraps_lines=True,
    )
    methods = all_methods(
        args.methods,
        drafter=args.drafter,
        lengths=[args.num_speculative_tokens],
        budgets=[args.kv_budget],
        policies=["chunk_retrieval"],
    )
    document = {
        "provenance": provenance.collect(vars(args) | {"output": str(args.output)})
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for rows in measure(methods, [p.token_ids for p in prompts], args):
        args.output.write_text(json.dumps({"rows": rows, **document}, indent=1))
    for row in rows:
        print(json.dumps(row))


def measure(
    methods: list[Method], prompts: list[list[int]], args: argparse.Namespace
) -> Iterator[Rows]:
    """All rows so far, after each batch size; the first turn warms up."""
    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": args.context_tokens + args.new_tokens,
        "max_num_seqs": max(args.batch_sizes),
        "enable_prefix_caching": False,
        **args.engine_args,
    }
    sampling = {"temperature": 0.0, "ignore_eos": True}

    def decode(engine: Any, batch_size: int) -> tuple[BatchGeneration, BatchGeneration]:
        """With one new token, and with all."""
        some = prompts[:batch_size]
        short, long = (
            engine.generate_batch(some, {**sampling, "max_tokens": new_tokens})
            for new_tokens in (1, args.new_tokens)
        )
        return short, long

    runs: dict[int, Turns] = {size: {} for size in args.batch_sizes}
    described: dict[str, dict[str, Any]] = {}
    memory = memory_at_hand()
    for group in together_or_in_turn(methods, engine_args, memory, _tell):
        with running(group, engine_args, memory, _tell) as engines:
            for size, found in runs.items():
                for turn in range(1 + args.repeats):
                    pairs = take_turns(engines, turn, partial(decode, batch_size=size))
                    for name, pair in pairs.items() if turn else ():
                        found.setdefault(name, []).append(pair)
                described |= {name: each.describe() for name, each in engines.items()}
                yield [
                    {**row, **described[row["method"]]}
                    for batch_size, turns in runs.items()
                    for row in table(batch_size, args.new_tokens, turns)
                ]


def table(batch_size: int, new_tokens: int, turns: Turns) -> Rows:
    """A row for each method; without plain vLLM's runs there is no speed-up yet."""
    seconds = {
        name: [long.seconds - short.seconds for short, long in pairs]
        for name, pairs in turns.items()
    }
    rows = []
    for name, pairs in turns.items():
        _, last = pairs[-1]
        ratios = zip(seconds.get(PLAIN, []), seconds[name], strict=False)
        speedups = [plain / mine for plain, mine in ratios]
        rows.append(
            {
                "method": name,
                "batch_size": batch_size,
                "prompt_seconds": statistics.median(s.seconds for s, _ in pairs),
                "decode_tokens_per_second": batch_size
                * (new_tokens - 1)
                / statistics.median(seconds[name]),
                "decode_speedup": statistics.median(speedups) if speedups else None,
                "acceptance_rate": last.num_accepted_tokens
                / max(1, last.num_draft_tokens),
            }
        )
    return rows


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
