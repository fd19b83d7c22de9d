r"""FlexDraft in vLLM engines, beside a decoder and beside what vLLM has itself.

    python -m benchmarks.flexdraft_engines --target TARGET --flexdraft FLEX \
        --decoder DRAFTER --data chat=questions.jsonl summary=book.jsonl.xz \
        --output results.json

Two parts. ``speed``: engines of all methods take turns with the same prompts, by task,
context and batch size; how long their answers take, how many drafts are accepted, and
how long drafting takes of it. Prompts are in vLLM's prefix cache by then. ``draft``:
the time of one draft of mask tokens and of the decoder, by context and budget, without
an engine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.parts import run_parts
from vllm_budgetdraft.attention.backend import select_operations
from vllm_budgetdraft.comparison.measure import prepare_environment
from vllm_budgetdraft.comparison.prompts import build_prompts
from vllm_budgetdraft.config import BudgetDraftConfig, SettledConfig
from vllm_budgetdraft.drafter.packing import can_pack
from vllm_budgetdraft.flexdraft.checkpoint import load_flexdraft
from vllm_budgetdraft.flexdraft.packing import pack_matrices
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.proposer.building import build_proposer

#: Tokens of a page in the part without an engine.
PAGE_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--flexdraft", required=True)
    parser.add_argument("--decoder", required=True)
    parser.add_argument("--draft-model", help="for vLLM's own; the decoder")
    parser.add_argument("--data", nargs="+", required=True, metavar="TASK=SOURCE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--context-tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--prompts", type=int, default=4, help="of each case")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=3, help="of a case")
    parser.add_argument("--methods", nargs="+", help="of those in the code; or all")
    parser.add_argument("--kv-budget", type=int, default=512)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument(
        "--draft-contexts", type=int, nargs="+", default=[1024, 4096, 8000]
    )
    parser.add_argument("--draft-repeats", type=int, default=40)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    prepare_environment()
    run_parts(args, PARTS, summary)


def methods(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """Speculative settings of each, plain vLLM's first."""
    count = {"num_speculative_tokens": args.num_speculative_tokens}
    ours = {
        **count,
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "kv_budget": args.kv_budget,
    }
    flex = ours | {"model": args.flexdraft}
    found: dict[str, dict[str, Any] | None] = {
        "vllm": None,
        "ngram": {
            **count,
            "method": "ngram",
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        },
        "draft_model": {
            **count,
            "method": "draft_model",
            "model": args.draft_model or args.decoder,
        },
        "decoder": ours | {"model": args.decoder},
        "sequential": flex | {"flex_decoding": "sequential"},
        "parallel": flex | {"flex_decoding": "parallel"},
        "auto": flex | {"flex_decoding": "auto"},
    }
    return {name: found[name] for name in args.methods or found}


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows by method, task, context and batch size; times are medians."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    cases: dict[tuple[str, int], list[list[int]]] = {}
    for each in build_prompts(
        tokenizer,
        dict(each.split("=", 1) for each in args.data),
        lengths=args.context_tokens,
        count=args.prompts,
        unwraps_lines=True,
        uses_template=True,
    ):
        cases.setdefault((each.task, each.context_tokens), []).append(each.token_ids)
    context, rows = get_context("spawn"), []
    engines = {
        name: ProcessPoolExecutor(1, context, initializer=start, initargs=(args, some))
        for name, some in methods(args).items()
    }
    for name, engine in engines.items():  # one after the other, each with all cores
        engine.submit(answer, [[1, 2, 3]], 1, 4, 0.0).result()
        print(f"{name} is ready", flush=True)
    for (task, length), prompts in cases.items():
        for batch in args.batch_sizes:
            asked = [prompts[i % len(prompts)] for i in range(max(batch, len(prompts)))]
            job = asked, batch, args.new_tokens, args.temperature
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
            for turn in range(args.repeats + 1):
                for name, engine in engines.items():
                    found = engine.submit(answer, *job).result()
                    if turn:  # prompts are known by then, and code is made
                        runs[name].append(found)
            for name, some in runs.items():
                row = {
                    "method": name,
                    "task": task,
                    "context_tokens": length,
                    "batch_size": batch,
                    **of_runs(some),
                }
                print(row, flush=True)
                rows.append(row)
    for engine in engines.values():
        engine.shutdown()
    return rows


def of_runs(runs: list[dict[str, float]]) -> dict[str, Any]:
    """What several runs of a job come to."""
    steps = sum(each["steps"] for each in runs)
    accepted = sum(each["accepted"] for each in runs)
    found: dict[str, Any] = {
        "tokens_per_second": statistics.median(
            each["tokens"] / each["seconds"] for each in runs
        ),
        "all_seconds": [each["seconds"] for each in runs],
    }
    if steps:
        drafting = statistics.median(each["draft_seconds"] for each in runs)
        found["acceptance_length"] = 1 + accepted / steps
        found["draft_share"] = drafting / statistics.median(found["all_seconds"])
    return found


_llm: Any


def start(args: argparse.Namespace, speculative: dict[str, Any] | None) -> None:
    """An engine, for the life of a process."""
    global _llm
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    _llm = LLM(
        args.target,
        dtype="float32",
        max_model_len=max(args.context_tokens) + 512,
        max_num_seqs=max(args.batch_sizes),
        speculative_config=speculative,
        disable_log_stats=False,
    )


def answer(
    prompts: list[list[int]], batch: int, new_tokens: int, temperature: float
) -> dict[str, float]:
    """Answers prompts, so many at a time."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=temperature, max_tokens=new_tokens)
    before, begun, tokens = counters(), time.perf_counter(), 0
    for first in range(0, len(prompts), batch):
        asked = [
            {"prompt_token_ids": prompt} for prompt in prompts[first : first + batch]
        ]
        for output in _llm.generate(asked, settings, use_tqdm=False):
            tokens += len(output.outputs[0].token_ids)
    seconds, after = time.perf_counter() - begun, counters()
    found = {name: after[name] - before[name] for name in after}
    return {"seconds": seconds, "tokens": tokens, **found}


def counters() -> dict[str, float]:
    """Of all requests so far: steps that verified drafts, and what drafting took."""
    from prometheus_client import REGISTRY

    values = {
        sample.name: sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
    }
    names = {
        "steps": "vllm:spec_decode_num_drafts_total",
        "accepted": "vllm:spec_decode_num_accepted_tokens_total",
        "draft_seconds": "vllm_budgetdraft:draft_seconds_total",
    }
    return {name: values.get(metric, 0.0) for name, metric in names.items()}


def draft(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a greedy draft of one request, by drafter, context and budget."""
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    longest = target.config.max_position_embeddings
    rows = []
    for context in args.draft_contexts:
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for budget in (args.kv_budget, longest):
            label = "all" if budget == longest else str(budget)
            common = {"num_speculative_tokens": args.num_speculative_tokens}
            calls["flexdraft", label] = mask_draft(
                args, target, context, budget, longest, common
            )
            if label != "all":
                calls["flexdraft, not packed", label] = mask_draft(
                    args, target, context, budget, longest, common, packs=False
                )
            calls["decoder", label] = decoder_draft(
                args, context, budget, longest, common
            )
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for _ in range(args.draft_repeats):
            for key, call in calls.items():
                begun = time.perf_counter()
                call()
                times[key].append(time.perf_counter() - begun)
        for (name, label), some in times.items():
            row = {
                "drafter": name,
                "context_tokens": context,
                "kv_budget": label,
                "milliseconds": 1000 * statistics.median(some),
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def mask_draft(
    args: argparse.Namespace,
    target: Any,
    context: int,
    budget: int,
    longest: int,
    common: dict[str, Any],
    packs: bool = True,
) -> Callable[[], Any]:
    """A draft over a cache of random keys and values, of that many tokens."""
    config = SettledConfig(
        model=args.flexdraft, kv_budget=budget, drafter_type="flexdraft", **common
    )
    drafter = load_flexdraft(args.flexdraft, target, max_positions=longest + 16)
    operations = select_operations("auto", torch.device("cpu"))
    core = MaskProposer(
        drafter,
        target,
        config,
        operations,
        num_slots=1,
        max_model_len=longest,
        seed=0,
    )
    if packs and can_pack():  # as in an engine
        pack_matrices(drafter, core.loop.parts)
    head_dim = drafter.rotary_table.shape[-1]
    shape = (longest // PAGE_SIZE, PAGE_SIZE, drafter.num_kv_heads, head_dim)
    layers = range(drafter.num_layers)
    core.bind([(torch.randn(shape), torch.randn(shape)) for _ in layers])
    slots, blocks = torch.tensor([0]), torch.arange(longest // PAGE_SIZE)
    core.choose(0, blocks, context, None)
    core.place(slots, blocks[None])
    last, ends = torch.tensor([[7]]), torch.tensor([context + 1])
    return lambda: core.draft(slots, last, ends)


def decoder_draft(
    args: argparse.Namespace,
    context: int,
    budget: int,
    longest: int,
    common: dict[str, Any],
) -> Callable[[], Any]:
    """The same of a decoder, whose cache has read a context of that many tokens."""
    core = build_proposer(
        BudgetDraftConfig(model=args.decoder, kv_budget=budget, **common),
        num_slots=1,
        max_model_len=longest,
        dtype=torch.float32,
        device="cpu",
    )
    core.start_request(0)
    core.ingest(0, torch.full((context - 1,), 7))
    slots, ends = torch.tensor([0]), torch.tensor([context + 1])
    last = torch.tensor([[7, 7]])
    return lambda: core.draft(slots, last, ends)


def summary(document: dict[str, Any]) -> dict[str, float]:
    """What the parts come to, of those that were measured."""
    found = {}
    if rows := document.get("speed"):
        by = {
            (r["method"], r["task"], r["context_tokens"], r["batch_size"]): r
            for r in rows
        }
        cases = {key[1:] for key in by}
        lengths = [r["acceptance_length"] for r in rows if r["method"] == "sequential"]
        found["acceptance_length"] = statistics.fmean(lengths)
        for batch in {case[2] for case in cases}:
            of_batch = [case for case in cases if case[2] == batch]
            for name, over in (("parallel", "sequential"), ("sequential", "vllm")):
                if (name, *of_batch[0]) in by and (over, *of_batch[0]) in by:
                    found[f"{name}_over_{over}_batch_{batch}"] = (
                        statistics.geometric_mean(
                            by[name, *case]["tokens_per_second"]
                            / by[over, *case]["tokens_per_second"]
                            for case in of_batch
                        )
                    )
        better = [
            by["auto", *case]["tokens_per_second"]
            / max(
                by[mode, *case]["tokens_per_second"]
                for mode in ("parallel", "sequential")
            )
            for case in cases
            if ("auto", *case) in by
        ]
        if better:
            found["auto_over_better_mode"] = statistics.geometric_mean(better)
    if rows := document.get("draft"):
        mine = [
            r["milliseconds"]
            for r in rows
            if r["drafter"] == "flexdraft" and r["kv_budget"] != "all"
        ]
        found["draft_time_longest_over_shortest"] = mine[-1] / mine[0]
    return found


PARTS = {"draft": draft, "speed": speed}

if __name__ == "__main__":
    main()
