"""Every method on the same passages, in turns, and what came of it."""

import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_budgetdraft.config import parse_speculative_config
from vllm_budgetdraft.evaluation import provenance

#: OpenMP keeps threads waiting actively for 0.2 s after an engine's last operation, at
#: the cost of the engine whose turn comes next.
PAUSE_SECONDS = 0.5
EXCERPT = Path(__file__).with_name("excerpt.txt")


def run(args: Namespace) -> None:
    """Measures, prints the table, and writes ``args.json``."""
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from vllm_budgetdraft.vllm_integration.engine_process import EngineProcess

    prepare_environment()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    methods = _speculative_configs(args)
    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": max(args.context_tokens) + args.new_tokens,
        "max_num_seqs": 4,
        # Every request pays for its own prompt.
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    runs: dict[tuple[str, int], list[Any]] = {}
    num_turns = len(methods) * (1 + len(args.context_tokens) * (1 + args.repeats))
    with ExitStack() as stack, tqdm(total=num_turns, unit="run") as progress:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {}
        for method, config in methods.items():
            progress.set_description(f"starting {method}")
            engine = EngineProcess(
                {**engine_args, "speculative_config": config}, logs / f"{method}.log"
            )
            engines[method] = stack.enter_context(engine)
            progress.update()
        for context_tokens, passages in _passages(tokenizer, args).items():
            progress.set_description(f"{context_tokens} tokens")
            for engine in engines.values():
                engine.generate(passages[0], 16)  # Warms up.
                progress.update()
            order = list(engines)
            for passage in passages:
                for method in order:
                    time.sleep(PAUSE_SECONDS)
                    generation = engines[method].generate(passage, args.new_tokens)
                    runs.setdefault((method, context_tokens), []).append(generation)
                    progress.update()
                order.append(order.pop(0))

    results = [
        _summary(method, length, runs[method, length], runs["vllm", length])
        | _draft_kv_bytes(
            methods[method], length + args.new_tokens, engine_args, args.drafter
        )
        for length in sorted(args.context_tokens)
        for method in methods
    ]
    document = {
        "results": results,
        "provenance": provenance.collect(
            {**_plain_arguments(args), "engine_args": engine_args}
        ),
    }
    print_table(results)
    shown = runs["budgetdraft", args.context_tokens[-1]][0]
    print(f"\nThe first passage goes on like this:\n\n{shown.text[:600]} ...\n")
    if args.json:
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n")
        print(f"Written to {args.json}.")


def print_table(results: list[dict[str, Any]]) -> None:
    """The results as people read them."""
    titles = (
        f"{'context':>7}  {'method':<20}{'tok/s':>7}{'speed-up':>10}{'decode':>8}"
        f"{'accept.':>9}  {'draft KV':>9}{'of full':>8}  {'same':<5}per position"
    )
    print(f"\n{titles}\n{'-' * len(titles)}")
    for row in results:
        print(
            f"{row['context_tokens']:>7}  {row['method']:<20}"
            f"{row['output_throughput']:>7.0f}{row['speedup']:>9.2f}x"
            f"{row['decode_speedup']:>7.2f}x{_draft_columns(row):<26}   "
            f"{'yes' if row['output_identical'] else 'NO':<5}"
            + " ".join(f"{rate:.2f}" for rate in row["acceptance_per_position"])
        )
    print(
        "\ntok/s: new tokens over the whole time of a request, prompt included; "
        "speed-up: of the same,\nmedian over passages; decode: speed-up after the "
        "first token; accept.: acceptance length, with\nthe bonus token; same: every "
        "token equals plain vLLM's."
    )


def _draft_columns(row: dict[str, Any]) -> str:
    """Acceptance length, draft KV and its share; blank where a method has none."""
    length, held = row["acceptance_length"], row["draft_kv_bytes_per_request"]
    columns = f"{length:>9.2f}" if length else ""
    if held:
        columns += f"{held / 1024:>7.0f} KiB{held / row['full_draft_kv_bytes']:>7.0%}"
    return columns


def _plain_arguments(args: Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if not callable(value)}


def prepare_environment() -> None:
    """The same for every engine, before the first starts."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # vLLM recommends Intel's OpenMP runtime on CPUs.
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.is_file() and "libiomp" not in os.environ.get("LD_PRELOAD", ""):
        preloaded = os.environ.get("LD_PRELOAD")
        os.environ["LD_PRELOAD"] = f"{openmp}:{preloaded}" if preloaded else str(openmp)


def _passages(tokenizer: Any, args: Namespace) -> dict[int, list[list[int]]]:
    """By length, ``args.repeats`` passages in different places of the excerpt."""
    text = EXCERPT.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(args.context_tokens)
    if longest > len(tokens):
        raise SystemExit(
            f"--context-tokens {longest} exceeds the excerpt's {len(tokens)} tokens"
        )
    stride = (len(tokens) - longest) // max(1, args.repeats - 1)
    ends = [longest + repeat * stride for repeat in range(args.repeats)]
    return {
        length: [tokens[end - length : end] for end in ends]
        for length in sorted(args.context_tokens)
    }


def _speculative_configs(args: Namespace) -> dict[str, dict[str, Any] | None]:
    """vLLM's ``speculative_config`` of each method."""
    k = args.num_speculative_tokens
    ours = {
        "method": "budgetdraft",
        "model": args.drafter,
        "num_speculative_tokens": k,
        "kv_budget": args.kv_budget,
        "eviction_policy": args.eviction_policy,
    }
    return {
        "vllm": None,
        "ngram": {
            "method": "ngram",
            "num_speculative_tokens": k,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        },
        "draft_model": {
            "method": "draft_model",
            "model": args.drafter,
            "num_speculative_tokens": k,
        },
        "budgetdraft_keep_all": {**ours, "eviction_policy": "keep_all"},
        "budgetdraft": ours,
    }


def _draft_kv_bytes(
    speculative_config: dict[str, Any] | None,
    num_tokens: int,
    engine_args: dict[str, Any],
    drafter: str,
) -> dict[str, int | None]:
    """KV bytes that a drafter holds for a request of ``num_tokens`` at its end.

    ``full_draft_kv_bytes`` is what this drafter's keys and values of all tokens take.
    """
    import torch

    from vllm_budgetdraft.drafter.configuration import read_drafter_config, settle
    from vllm_budgetdraft.proposer.memory import MemoryPlan, resolve_dtype

    method = (speculative_config or {}).get("method")
    if method not in ("draft_model", "budgetdraft"):
        return {"draft_kv_bytes_per_request": None, "full_draft_kv_bytes": None}
    settings = dict(speculative_config or {}, method=None)
    del settings["method"]
    config = parse_speculative_config(settings)
    dtype = getattr(torch, engine_args["dtype"])
    if method == "budgetdraft":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = resolve_dtype(config, device, dtype)
    drafter_config = read_drafter_config(drafter)
    max_model_len = engine_args["max_model_len"]
    plan = MemoryPlan.of(
        settle(config, drafter_config, max_model_len),
        drafter_config,
        num_slots=engine_args["max_num_seqs"],
        max_model_len=max_model_len,
        dtype=dtype,
    )
    full = num_tokens * plan.bytes_per_token
    held = plan.cache_per_request if method == "budgetdraft" else full
    return {"draft_kv_bytes_per_request": held, "full_draft_kv_bytes": full}


def _summary(
    method: str, context_tokens: int, runs: list[Any], plain: list[Any]
) -> dict[str, Any]:
    """One row: medians over the passages, paired with plain vLLM's runs."""
    drafts = sum(run.num_drafts for run in runs)
    by_position = zip(*(run.accepted_per_position for run in runs), strict=True)
    accepted = [sum(counts) for counts in by_position]
    pairs = list(zip(runs, plain, strict=True))
    return {
        "method": method,
        "context_tokens": context_tokens,
        "output_throughput": statistics.median(
            len(run.token_ids) / run.seconds for run in runs
        ),
        "decode_throughput": statistics.median(
            (len(run.token_ids) - 1) / run.decode_seconds for run in runs
        ),
        "speedup": statistics.median(base.seconds / run.seconds for run, base in pairs),
        "decode_speedup": statistics.median(
            base.decode_seconds / run.decode_seconds for run, base in pairs
        ),
        "acceptance_length": 1 + sum(accepted) / drafts if drafts else None,
        "acceptance_per_position": [count / drafts for count in accepted],
        "output_identical": all(run.token_ids == base.token_ids for run, base in pairs),
        "runs": [
            {key: value for key, value in asdict(run).items() if key != "token_ids"}
            for run in runs
        ],
    }
