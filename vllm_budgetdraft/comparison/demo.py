"""``budgetdraft demo``: vLLM with and without BudgetDraft on pages of a novel."""

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from vllm_budgetdraft.comparison import measure
from vllm_budgetdraft.comparison.methods import Method, all_methods
from vllm_budgetdraft.comparison.prompts import EXCERPT, build_prompts
from vllm_budgetdraft.comparison.summary import same, summarise
from vllm_budgetdraft.config import parse_speculative_config
from vllm_budgetdraft.evaluation import provenance
from vllm_budgetdraft.vllm_integration.engine_process import preload


def run(args: Namespace) -> None:
    """Measures, prints the table, and writes ``args.json``."""
    measure.prepare_environment()
    preload()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.target)
    methods = all_methods(
        ["ngram", "draft_model", "budgetdraft"],
        drafter=args.drafter,
        lengths=[args.num_speculative_tokens],
        budgets=[args.kv_budget],
        policies=list(dict.fromkeys(["keep_all", args.eviction_policy])),
    )
    prompts = build_prompts(
        tokenizer,
        {"books": str(EXCERPT)},
        lengths=sorted(args.context_tokens),
        count=args.repeats,
    )
    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": max(args.context_tokens) + args.new_tokens,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = measure.RoundsFile(Path(folder) / "rounds.jsonl")
        measure.measure(
            methods,
            prompts,
            engine_args,
            file,
            new_tokens=args.new_tokens,
            temperature=0.0,
            engines_at_once=len(methods),
            profiles=False,
        )
        rounds = file.read()
    by_name = {method.name: method for method in methods}
    results = [
        row
        | _draft_kv_bytes(
            by_name[row["method"]],
            row["context_tokens"] + args.new_tokens,
            measure.SHARED_ENGINE_ARGS | engine_args,
            args.drafter,
        )
        for row in summarise(methods, rounds)
    ]
    results.sort(key=lambda row: row["context_tokens"])
    print_table(results)
    longest = [r for r in rounds if r["context_tokens"] == max(args.context_tokens)]
    text = tokenizer.decode(longest[0]["runs"][methods[-1].name]["token_ids"])
    print(f"\nThe first passage goes on like this:\n\n{text[:600]} ...\n")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if not callable(v)}
        settings["engine_args"] = engine_args
        document = {"results": results, "provenance": provenance.collect(settings)}
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n")
        print(f"Written to {args.json}.")


def print_table(results: list[dict[str, Any]]) -> None:
    """The results as people read them."""
    titles = (
        f"{'context':>7}  {'method':<44}{'tok/s':>7}{'speed-up':>10}{'decode':>8}"
        f"{'accept.':>9}  {'draft KV':>9}{'of full':>8}  {'same':<8}per position"
    )
    print(f"\n{titles}\n{'-' * len(titles)}")
    for row in results:
        print(
            f"{row['context_tokens']:>7}  {row['method']:<44}"
            f"{row['output_throughput']:>7.0f}{row['speedup']:>9.2f}x"
            f"{row['decode_speedup']:>7.2f}x{_draft_columns(row):<26}   "
            f"{same(row):<8}"
            + " ".join(f"{rate:.2f}" for rate in row["acceptance_per_position"])
        )
    print(
        "\ntok/s: new tokens over the whole time of a request, prompt included; "
        "speed-up: of the same,\nmedian over passages; decode: speed-up after the "
        "first token; accept.: acceptance length, with\nthe bonus token; same: every "
        "token equals plain vLLM's, or how many outputs part at a tie within rounding."
    )


def _draft_columns(row: dict[str, Any]) -> str:
    """Acceptance length, draft KV and its share; blank where a method has none."""
    length, held = row["acceptance_length"], row["draft_kv_bytes_per_request"]
    columns = f"{length:>9.2f}" if length else ""
    if held:
        columns += f"{held / 1024:>7.0f} KiB{held / row['full_draft_kv_bytes']:>7.0%}"
    return columns


def _draft_kv_bytes(
    method: Method, num_tokens: int, engine_args: dict[str, Any], drafter: str
) -> dict[str, int | None]:
    """KV bytes that a drafter holds for a request of ``num_tokens`` at its end.

    ``full_draft_kv_bytes`` is what this drafter's keys and values of all tokens take.
    """
    import torch

    from vllm_budgetdraft.attention.backend import default_device
    from vllm_budgetdraft.drafter.configuration import read_drafter_config, settle
    from vllm_budgetdraft.proposer.memory import MemoryPlan, resolve_dtype

    if method.kind not in ("draft_model", "budgetdraft"):
        return {"draft_kv_bytes_per_request": None, "full_draft_kv_bytes": None}
    settings = dict(method.engine_args["speculative_config"])
    del settings["method"]
    config = parse_speculative_config(settings)
    dtype = getattr(torch, engine_args["dtype"])
    if method.kind == "budgetdraft":
        dtype = resolve_dtype(config, default_device().type, dtype)
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
    held = plan.cache_per_request if method.kind == "budgetdraft" else full
    return {"draft_kv_bytes_per_request": held, "full_draft_kv_bytes": full}
