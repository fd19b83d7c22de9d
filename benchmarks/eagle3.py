"""An EAGLE-3 head on a budget: beside a decoder, and beside vLLM's own method.

Three parts. Acceptance lengths of a head and of a decoder of the same target, on the
same prompts, by budget and temperature. The time of a draft of each. And the time of a
head's drafts, and the memory of its keys and values, at long contexts, in vLLM engines:
with a budget, and by vLLM's own ``eagle3``, which keeps the whole context.

    python -m benchmarks.eagle3 --target TARGET --head HEAD --decoder DRAFTER \\
        --data chat=benchmarks/results/chat/questions.jsonl --output results.json

Contexts of the third part are longer than what a small target can read, and their first
tokens are none: an engine is told that it has them, and finds zeros. What it computes
means nothing then, and takes as long as if it did.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

from benchmarks.parts import run_parts
from vllm_budgetdraft.comparison.measure import prepare_environment
from vllm_budgetdraft.comparison.prompts import build_prompts
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.drafter.checkpoint import EMBEDDING, embeddings_of
from vllm_budgetdraft.evaluation.acceptance import HeldOutAcceptance
from vllm_budgetdraft.proposer.building import build_proposer

#: Of a long context, what is computed, the rest being said to be known: more than the
#: budget, so that the draft cache is full.
COMPUTED_TOKENS = 1024
#: Requests that draft at once.
BATCH_SIZES = (1, 4, 8)
#: Drafts of a run that are not counted.
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--decoder", required=True)
    parser.add_argument("--data", nargs="+", required=True, metavar="TASK=SOURCE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--context-tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--prompts", type=int, default=8, help="of each case")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument(
        "--kv-budgets",
        type=int,
        nargs="+",
        default=[128, 512, 8192],
        help="the largest of which is meant to hold the whole context",
    )
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=40, help="of a draft")
    parser.add_argument(
        "--long-contexts", type=int, nargs="+", default=[8192, 32768, 131072]
    )
    parser.add_argument("--long-budget", type=int, default=512)
    parser.add_argument("--long-runs", type=int, default=2, help="of each method")
    parser.add_argument("--long-steps", type=int, default=16, help="of each run")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="to be measured; those that the output has already stay there",
    )
    args = parser.parse_args()
    prepare_environment()
    run_parts(args, PARTS, summary)


def acceptance(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Acceptance lengths by drafter, task, context, budget and temperature."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts: dict[int | str, list[list[int]]] = {}
    for each in build_prompts(
        tokenizer,
        dict(each.split("=", 1) for each in args.data),
        lengths=args.context_tokens,
        count=args.prompts,
        unwraps_lines=True,
        uses_template=True,
    ):
        case = json.dumps([each.task, each.context_tokens])
        prompts.setdefault(case, []).append(each.token_ids)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    ends = target.generation_config.eos_token_id
    rows = []
    for case, some in prompts.items():  # what is known at the end of each is said
        measure = HeldOutAcceptance(
            target,
            {case: some},
            budgets=args.kv_budgets,
            temperatures=args.temperatures,
            new_tokens=args.new_tokens,
            settings={"num_speculative_tokens": args.num_speculative_tokens},
            end_tokens=[ends] if isinstance(ends, int) else ends or [],
        )
        task, context = json.loads(case)
        for drafter in ("head", "decoder"):
            for row in measure.rows(Path(getattr(args, drafter))):
                found = {
                    "drafter": drafter,
                    "task": task,
                    "context_tokens": context,
                    "kv_budget": row.budget,
                    "temperature": row.temperature,
                    "acceptance_length": row.acceptance_length,
                }
                print(found, flush=True)
                rows.append(found)
    return rows


def drafts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of drafts over full caches, by drafter, batch and temperature."""
    embedding = embeddings_of(AutoModelForCausalLM.from_pretrained(args.target))
    proposers = {}
    for name in ("head", "decoder"):
        proposer = proposers[name] = build_proposer(
            BudgetDraftConfig(
                model=getattr(args, name),
                num_speculative_tokens=args.num_speculative_tokens,
                kv_budget=args.long_budget,
            ),
            num_slots=max(BATCH_SIZES),
            max_model_len=4 * args.long_budget,
            dtype=torch.float32,
            device="cpu",
            embedding=embedding[EMBEDDING].float(),
        )
        for slot in range(max(BATCH_SIZES)):
            proposer.start_request(slot)
    rows = []
    for batch in BATCH_SIZES:
        slots = torch.arange(batch)
        # All that a slot has room for is held.
        ends = slots.new_full((batch,), args.long_budget + 100)
        for temperatures in (None, torch.ones(batch)):
            times: dict[str, list[float]] = {name: [] for name in proposers}
            for _ in range(args.repeats):
                for name, proposer in proposers.items():
                    tokens = slots.new_full((batch, proposer.first_width), 7)
                    fed = proposer.blank_fed(batch)
                    begun = time.perf_counter()
                    proposer.draft(slots, tokens, ends, None, temperatures, fed=fed)
                    times[name].append(time.perf_counter() - begun)
            for name in proposers:
                row = {
                    "drafter": name,
                    "batch_size": batch,
                    "is_drawn": temperatures is not None,
                    "milliseconds": 1000 * statistics.median(times[name]),
                }
                print(row, flush=True)
                rows.append(row)
    return rows


def long_contexts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over runs of what a draft takes, and bytes of keys and values.

    Runs of the methods take turns, each in a process of its own.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        head = long_head(args.head, Path(folder) / "head", 2 * max(args.long_contexts))
        budgeted = {"method": "budgetdraft", "kv_budget": args.long_budget}
        methods = {
            "eagle3": {"method": "eagle3"},
            "budgetdraft": budgeted | {"adaptive_draft_length": False},
            "budgetdraft, streaming": budgeted
            | {"adaptive_draft_length": False, "draft_prefill": "streaming"},
        }
        for context in args.long_contexts:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
            for _ in range(args.long_runs):
                for name, method in methods.items():
                    speculative = method | {
                        "model": head,
                        "num_speculative_tokens": args.num_speculative_tokens,
                    }
                    run = in_process(
                        long_run, args.target, speculative, context, args.long_steps
                    )
                    runs[name].append(run)
            for name, some in runs.items():
                row = {"method": name, "context_tokens": context} | some[0]
                times = [each["milliseconds"] for each in some]
                row["milliseconds"] = statistics.median(times)
                row["all_milliseconds"] = times
                print(row, flush=True)
                rows.append(row)
    return rows


def long_head(head: str, folder: Path, positions: int) -> str:
    """A copy of a head that is said to have learnt so many positions."""
    shutil.copytree(head, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["max_position_embeddings"] = positions
    file.write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def long_run(
    target: str, speculative: dict[str, Any], context: int, steps: int
) -> dict[str, Any]:
    """A request of which an engine is said to know all but the last tokens."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.v1.spec_decode.eagle import EagleProposer

    from vllm_budgetdraft.vllm_integration.v1.proposer import BudgetDraftProposer

    is_ours = speculative["method"] == "budgetdraft"
    kind: Any = BudgetDraftProposer if is_ours else EagleProposer
    seconds: list[float] = []
    propose = kind.propose

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        found = propose(self, *args, **kwargs)
        seconds.append(time.perf_counter() - begun)
        return found

    kind.propose = timed
    longest = context + 1024
    llm = LLM(
        target,
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=1,
        enforce_eager=True,
        hf_overrides={"max_position_embeddings": longest},
        speculative_config=speculative,
        kv_transfer_config={
            "kv_connector": "Known",
            "kv_connector_module_path": __name__
            if __name__ != "__main__"
            else "benchmarks.eagle3",
            "kv_role": "kv_both",
        },
        disable_hybrid_kv_cache_manager=True,
    )
    core: Any = llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    seconds.clear()
    llm.generate(
        {"prompt_token_ids": [5 + each % 1000 for each in range(context)]},
        SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True),
    )
    proposer = runner.drafter
    return {
        "milliseconds": 1000 * statistics.median(seconds[-steps + WARM_UP :]),
        "kv_bytes": ours(proposer) if is_ours else theirs(runner, context),
        "shared_bytes": proposer._core.reader.prompt.num_bytes if is_ours else 0,
    }


def ours(proposer: Any) -> int:
    """Bytes of keys and values of one request's slot."""
    pool = proposer._core.cache.pool
    pages = proposer._core.cache.pages_per_slot
    return pages * (pool.keys.nbytes + pool.values.nbytes) // len(pool.keys[0])


def theirs(runner: Any, context: int) -> int:
    """Bytes of blocks that hold a head's keys and values of a context."""
    for group in runner.kv_cache_config.kv_cache_groups:
        names = set(group.layer_names) & runner.drafter._draft_attn_layer_names
        if names:
            spec = group.kv_cache_spec
            blocks = math.ceil(context / spec.block_size)
            return len(names) * blocks * spec.page_size_bytes
    raise RuntimeError("the engine has no keys and values of a head")


class Known(KVConnectorBase_V1):
    """Says that all but the last tokens of a prompt are known, and loads nothing."""

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        block = self._vllm_config.cache_config.block_size
        known = (request.num_tokens - COMPUTED_TOKENS) // block * block
        return max(0, known - num_computed_tokens), False

    def update_state_after_alloc(self, *args: Any) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...


def summary(document: dict[str, Any]) -> dict[str, float]:
    """What the parts come to, of those that were measured."""
    found = {}
    if rows := document.get("acceptance"):
        found["acceptance_length_over_decoder"] = over(rows, "acceptance_length")
    if rows := document.get("drafts"):
        found["draft_time_over_decoder"] = over(rows, "milliseconds")
    if rows := document.get("long"):
        longest = max(row["context_tokens"] for row in rows)
        of = {r["method"]: r for r in rows if r["context_tokens"] == longest}
        mine, peer = of["budgetdraft"], of["eagle3"]
        found["longest_draft_time_over_vllm"] = (
            mine["milliseconds"] / peer["milliseconds"]
        )
        found["longest_kv_bytes_over_vllm"] = mine["kv_bytes"] / peer["kv_bytes"]
    return found


def over(rows: list[dict[str, Any]], name: str) -> float:
    """Geometric mean over cases of the head's value by the decoder's."""
    by_drafter: dict[str, list[float]] = {"head": [], "decoder": []}
    for row in rows:
        by_drafter[row["drafter"]].append(row[name])
    pairs = zip(by_drafter["head"], by_drafter["decoder"], strict=True)
    return statistics.geometric_mean(mine / other for mine, other in pairs)


PARTS = {"acceptance": acceptance, "drafts": drafts, "long": long_contexts}

if __name__ == "__main__":
    main()
