"""The time of one draft: by batch size, context and operation.

    python -m benchmarks.draft_steps --output results/draft-steps.json

Rows are of two forms of a drafter: on a GPU with and without graphs, on a CPU with
matrices in float32 and as ``draft_dtype: auto`` keeps them. Without ``--drafter``
it has llama-68m's shape and random weights (on a CPU a tiny one, which shows that this
works). Caches are full: of a context that long, the budget and the recent window are
held. Times are medians of alternated runs, from the call to the drafts on the device.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_budgetdraft import provenance
from vllm_budgetdraft.attention.backend import default_device
from vllm_budgetdraft.config import BudgetDraftConfig, settle
from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.proposer.building import build_proposer
from vllm_budgetdraft.proposer.draft_graphs import CudaGraphCapture
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.memory import MemoryPlan
from vllm_budgetdraft.proposer.warm_up import warm_up

#: JackFram/llama-68m, the paper's drafter.
LLAMA_68M = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
NUM_PROFILED = 5


def main() -> None:
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8, 32] if is_gpu else [1, 2]
    )
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[1024, 16384, 131072] if is_gpu else [600, 1200],
    )
    parser.add_argument("--repeats", type=int, default=50 if is_gpu else 5)
    parser.add_argument("--drafter", help="a trained one")
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    args = parser.parse_args()
    shape, dtype = (LLAMA_68M, torch.bfloat16) if is_gpu else (TINY, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        if args.drafter is None:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**shape)).to(dtype).save_pretrained(folder)
        config = BudgetDraftConfig(
            model=args.drafter or folder,
            draft_sample_method="greedy",
            num_speculative_tokens=args.num_speculative_tokens,
            kv_budget=512,
        )
        if is_gpu:
            proposers = {
                name: build(config, args, dtype) for name in ("eager", "graphs")
            }
            num_graphs = proposers["graphs"].capture_graphs(CudaGraphCapture())
            print(f"{num_graphs} graphs")
        else:
            proposers = {
                name: build(
                    config.model_copy(update={"draft_dtype": name}), args, dtype
                )
                for name in ("float32", "auto")
            }
        drafter = read_drafter_config(config.model)
    rows = [
        row
        for context in args.contexts
        for batch in args.batch_sizes
        for row in measure(proposers, batch, context, args.repeats)
    ]
    document = {
        "rows": rows,
        "memory": memory(config, drafter, dtype),
        "provenance": provenance.collect(vars(args) | {"output": str(args.output)}),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1))


def build(
    config: BudgetDraftConfig, args: argparse.Namespace, dtype: torch.dtype
) -> DraftProposer:
    proposer = build_proposer(
        config,
        num_slots=max(args.batch_sizes),
        max_model_len=max(args.contexts) + config.num_speculative_tokens,
        dtype=dtype,
        device=default_device(),
    )
    warm_up(proposer)
    return proposer


def measure(
    proposers: dict[str, DraftProposer], batch: int, context: int, repeats: int
) -> list[dict[str, Any]]:
    """Drafts of ``batch`` requests after ``context`` tokens, with each proposer."""
    device = next(iter(proposers.values())).device
    slots = torch.arange(batch, device=device)
    tokens = torch.zeros((batch, FIRST_WIDTH), dtype=torch.int64, device=device)
    ends = torch.full_like(slots, context)
    for proposer in proposers.values():
        kept = min(proposer.cache.capacity, context) - proposer.max_drafts - FIRST_WIDTH
        for slot in range(batch):
            proposer.start_request(slot)
        # As if the rest of the context had been evicted.
        proposer.cache.num_evicted[:batch] = context - FIRST_WIDTH - kept
    seconds: dict[str, list[float]] = {name: [] for name in proposers}
    for _ in range(repeats + 3):
        for name, proposer in proposers.items():
            _wait(device)
            start = time.perf_counter()
            proposer.draft(slots, tokens, ends)
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, proposer in proposers.items():
        operations = profile(lambda each=proposer: each.draft(slots, tokens, ends))
        proposer.release_all()
        rows.append(
            {
                "proposer": name,
                "batch_size": batch,
                "context_tokens": context,
                "milliseconds": 1000 * statistics.median(seconds[name][3:]),
                "operations": operations,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def profile(draft: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a draft in each operation that takes 1 % or more of them."""
    is_gpu = torch.cuda.is_available()
    with torch.profiler.profile() as found:
        for _ in range(NUM_PROFILED):
            draft()
        if is_gpu:
            torch.cuda.synchronize()
    times = {
        each.key: each.self_device_time_total if is_gpu else each.self_cpu_time_total
        for each in found.key_averages()
    }
    total = sum(times.values())
    ranked = sorted(times.items(), key=lambda item: -item[1])
    return {
        name: round(microseconds / 1000 / NUM_PROFILED, 3)
        for name, microseconds in ranked
        if microseconds > 0.01 * total
    }


def memory(
    config: BudgetDraftConfig, drafter: LlamaConfig, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes of draft keys and values of 64 requests of 16,384 tokens, and unbounded."""
    plan = MemoryPlan.of(
        settle(config, {"position_mode": "absolute", "draft_prefill": "full"}),
        drafter,
        num_slots=64,
        max_model_len=16384,
        dtype=dtype,
    )
    return {"budgeted": plan.cache, "full": 64 * plan.full_cache_per_request}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
