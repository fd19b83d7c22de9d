r"""Decoding speed of many long requests at once, by method.

    python -m benchmarks.batched_decoding --target TARGET --drafter DRAFTER \
        --texts held-out.jsonl --context-tokens 16384 --batch-sizes 16 32 --output FILE

Each method is an engine of its own, one after the other, for a batch of long requests
fills the memory. The time of prompts is that of the same requests with one new token,
and is taken off.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_budgetdraft.comparison.methods import Method, all_methods
from vllm_budgetdraft.comparison.prompts import build_prompts
from vllm_budgetdraft.evaluation import provenance
from vllm_budgetdraft.vllm_integration.engine_process import EngineProcess


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
    document: dict[str, Any] = {
        "rows": [],
        "provenance": provenance.collect(vars(args) | {"output": str(args.output)}),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for method in methods:
        document["rows"] += measure(method, [p.token_ids for p in prompts], args)
        args.output.write_text(json.dumps(document, indent=1))


def measure(
    method: Method, prompts: list[list[int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": args.context_tokens + args.new_tokens,
        "max_num_seqs": max(args.batch_sizes),
        "enable_prefix_caching": False,
        **args.engine_args,
        **method.engine_args,
    }
    rows = []
    with (
        tempfile.TemporaryDirectory() as logs,
        EngineProcess(engine_args, Path(logs) / "log", method.environment) as engine,
    ):
        for batch_size in args.batch_sizes:
            some = prompts[:batch_size]
            seconds = {}
            for new_tokens in (1, args.new_tokens):
                sampling = {"temperature": 0.0, "max_tokens": new_tokens}
                runs = [
                    engine.generate_batch(some, {**sampling, "ignore_eos": True})
                    for _ in range(1 + args.repeats)
                ]
                seconds[new_tokens] = statistics.median(r.seconds for r in runs[1:])
            decoding = seconds[args.new_tokens] - seconds[1]
            num_drafts = runs[-1].num_draft_tokens
            rows.append(
                {
                    "method": method.name,
                    "batch_size": batch_size,
                    "prompt_seconds": seconds[1],
                    "decode_tokens_per_second": batch_size
                    * (args.new_tokens - 1)
                    / decoding,
                    "acceptance_rate": runs[-1].num_accepted_tokens
                    / max(1, num_drafts),
                    **engine.describe(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
