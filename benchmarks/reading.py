r"""What it takes to read prompts, and how long requests wait for their first drafts.

    python -m benchmarks.reading --target models/books-9m \
        --drafter models/books-9m-drafter --texts 'books/validation.jsonl.xz' \
        --output benchmarks/results/reading.json

Engines of plain vLLM and of this method take turns with the same requests: all at
once, one every few steps, and again with vLLM's prefix cache full of them. Then the
core reads the prompts packed and one by one; and with a drafter that computes nothing,
which leaves the host's part.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_budgetdraft import provenance
from vllm_budgetdraft.attention.backend import default_device
from vllm_budgetdraft.comparison.measure import prepare_environment
from vllm_budgetdraft.comparison.prompts import build_prompts
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.proposer.building import build_proposer
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.warm_up import warm_up
from vllm_budgetdraft.vllm_integration.metrics import prometheus as metrics
from vllm_budgetdraft.vllm_integration.metrics.statistics import KEY

NEW_TOKENS = 24
#: Steps between arrivals, where requests do not come at once.
STAGGER = 3
#: So few that moving their keys, which is the device's part, takes little of the time.
HOST_PROMPT_TOKENS, HOST_BUDGET = 24, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--kv-budget", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine-args", type=json.loads, default={})
    args = parser.parse_args()
    prepare_environment()
    begun = provenance.collect(vars(args) | {"output": str(args.output)})
    prompts = build_prompts(
        AutoTokenizer.from_pretrained(args.target),
        {"books": args.texts},
        lengths=[args.prompt_tokens],
        count=args.prompts * (args.repeats + 1),  # the first ones warm up
        unwraps_lines=True,
    )
    sets = [
        [prompt.token_ids for prompt in prompts[start : start + args.prompts]]
        for start in range(0, len(prompts), args.prompts)
    ]
    core = {"core": read_by_itself(args, sets[0]), "host": host_time(args)}
    cases = in_engines(args, sets)
    waits = Counter[int]()
    for case in ("at_once", "staggered"):
        waits += cases[case].pop("waits")
    cases["cached"]["steps_to_first_draft"] = dict(cases["cached"].pop("waits"))
    document = {
        "median_steps_to_first_draft": statistics.median(waits.elements()),
        "worst_steps_to_first_draft": max(waits),
        "steps_to_first_draft": dict(waits),
        "engines": cases,
        **core,
        "provenance": begun,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def in_engines(args: argparse.Namespace, sets: list[list[list[int]]]) -> dict[str, Any]:
    """By case: times to the first token in seconds, and what drafts waited for."""
    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": args.prompt_tokens + NEW_TOKENS + args.num_speculative_tokens,
        "max_num_seqs": args.prompts,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        **args.engine_args,
    }
    ours = {
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "model": args.drafter,
        "num_speculative_tokens": args.num_speculative_tokens,
        "kv_budget": args.kv_budget,
    }
    waits, skipped = watch_waits()
    engines = {
        "vllm": LLM(**engine_args),
        "budgetdraft": LLM(**engine_args, speculative_config=ours),
    }
    found: dict[str, Any] = {}
    for number, prompts in enumerate(sets):
        # Of each set the target's cache knows nothing before "at_once".
        for case, stagger in (("at_once", 0), ("cached", 0), ("staggered", STAGGER)):
            waits.clear()
            skipped.clear()
            outputs = {}
            for name in sorted(engines, reverse=bool(number % 2)):
                if case == "staggered":
                    engines[name].reset_prefix_cache()
                firsts, outputs[name] = serve(engines[name], prompts, stagger)
                if number:
                    of_case = found.setdefault(
                        case, {"waits": Counter(), "drafts_skipped": Counter()}
                    )
                    of_case.setdefault(f"{name}_seconds", []).append(
                        statistics.mean(firsts)
                    )
            assert outputs["vllm"] == outputs["budgetdraft"], (number, case)
            if number:
                found[case]["waits"] += waits
                found[case]["drafts_skipped"] += skipped
    for of_case in found.values():
        ratios = map(
            lambda ours, plain: ours / plain,
            of_case["budgetdraft_seconds"],
            of_case["vllm_seconds"],
        )
        of_case["first_token_ratio"] = statistics.median(ratios)
    return found


def watch_waits() -> tuple[Counter[int], Counter[str]]:
    """Steps that requests waited, and steps without drafts by reason, as counted."""
    waits, skipped = Counter[int](), Counter[str]()
    original = metrics.BudgetDraftStatLogger.record

    def record(self: Any, scheduler_stats: Any, *rest: Any, **more: Any) -> None:
        carried = scheduler_stats and scheduler_stats.kv_connector_stats
        for name, label, amount in (carried or {}).get(KEY, {"counts": []})["counts"]:
            if name == "steps_to_first_draft":
                waits[int(label)] += int(amount)
            elif name == "drafts_skipped":
                skipped[label] += int(amount)
        original(self, scheduler_stats, *rest, **more)

    metrics.BudgetDraftStatLogger.record = record  # type: ignore[method-assign]
    return waits, skipped


def serve(
    llm: LLM, prompts: list[list[int]], stagger: int
) -> tuple[list[float], list[list[int]]]:
    """Seconds from each request's arrival to its first token, and all tokens."""
    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    arrived, firsts, tokens = {}, {}, {}
    step = 0
    while len(arrived) < len(prompts) or engine.has_unfinished_requests():
        while len(arrived) < len(prompts) and step >= stagger * len(arrived):
            name = str(len(arrived))
            prompt = {"prompt_token_ids": prompts[len(arrived)]}
            arrived[name] = time.perf_counter()
            engine.add_request(name, prompt, sampling)
        for output in engine.step():
            firsts.setdefault(
                output.request_id, time.perf_counter() - arrived[output.request_id]
            )
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return list(firsts.values()), [tokens[name] for name in arrived]


def build(args: argparse.Namespace, budget: int, prompt_tokens: int) -> DraftProposer:
    config = BudgetDraftConfig(
        model=args.drafter,
        num_speculative_tokens=args.num_speculative_tokens,
        kv_budget=budget,
    )
    proposer = build_proposer(
        config,
        num_slots=args.prompts,
        max_model_len=prompt_tokens + NEW_TOKENS,
        dtype=getattr(torch, args.dtype),
        device=default_device(),
        batch_tokens=args.prompts * prompt_tokens,
    )
    warm_up(proposer)
    return proposer


def read_by_itself(
    args: argparse.Namespace, prompts: list[list[int]]
) -> dict[str, Any]:
    """Milliseconds to read all prompts, packed and one by one, in turns."""
    proposer = build(args, args.kv_budget, args.prompt_tokens)
    contexts = torch.tensor(prompts, device=proposer.device)
    slots = range(len(prompts))

    def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
        return torch.cat([contexts[slot, p.start : p.stop] for slot, p in pieces])

    def one_by_one() -> None:
        for slot in slots:
            proposer.read([slot], tokens_of, contexts.numel())

    times = in_turns(
        proposer,
        {
            "packed": lambda: proposer.read(slots, tokens_of, contexts.numel()),
            "one_by_one": one_by_one,
        },
        args.prompt_tokens,
        args.repeats,
    )
    ratios = map(lambda a, b: b / a, times["packed"], times["one_by_one"])
    return {
        **{f"{name}_ms": statistics.median(each) for name, each in times.items()},
        "speed_up": statistics.median(ratios),
    }


def host_time(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one read of all prompts, by a drafter that computes nothing."""
    proposer = build(args, HOST_BUDGET, HOST_PROMPT_TOKENS + args.prompts)
    proposer.drafter.forward = lambda tokens, attend: None  # type: ignore[assignment]
    tokens = torch.zeros(
        args.prompts * 2 * HOST_PROMPT_TOKENS, dtype=torch.int64, device=proposer.device
    )

    def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
        return tokens[: sum(len(piece) for _, piece in pieces)]

    def read() -> None:
        proposer.read(range(args.prompts), tokens_of, len(tokens))

    found = {}
    for name, more in (("of_one_length", 0), ("of_many_lengths", 1)):
        times = in_turns(proposer, {name: read}, HOST_PROMPT_TOKENS, 50, more)
        found[f"{name}_ms"] = statistics.median(times[name])
    return found


def in_turns(
    proposer: DraftProposer,
    ways: dict[str, Callable[[], Any]],
    num_tokens: int,
    repeats: int,
    more: int = 0,
) -> dict[str, list[float]]:
    """Milliseconds of each way to read contexts.

    Args:
        num_tokens: of the first context.
        more: tokens that each context has beyond the one before it.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, read in ways.items():
            for slot in range(proposer.cache.num_slots):
                proposer.start_reading(slot, num_tokens + more * slot)
            if proposer.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            read()
            if proposer.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
            assert not any(
                proposer.reader.is_reading(slot)
                for slot in range(proposer.cache.num_slots)
            )
            proposer.release_all()
    return times


if __name__ == "__main__":
    main()
