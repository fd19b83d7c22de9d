"""A drafter of a short native range, far beyond it: absolute or cache-relative.

Acceptance of an off-the-shelf style drafter, one that has never seen a position beyond
its native range or a cache that lacks anything, within that range and at 8 times it.

    python -m benchmarks.position_modes --drafter models/books-9m-native512 \
        --output benchmarks/results/position-modes.json

About 6 minutes on 2 CPU cores.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_budgetdraft import provenance
from vllm_budgetdraft.comparison.prompts import EXCERPT

TARGET = "models/books-9m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--native-tokens", type=int, default=512)
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--kv-budget", type=int, default=256)
    parser.add_argument("--recent-window", type=int, default=192)
    args = parser.parse_args()

    contexts = (args.native_tokens, args.factor * args.native_tokens)
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    text = EXCERPT.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = (len(tokens) - contexts[1]) // (args.passages - 1)
    ends = [contexts[1] + i * step - args.new_tokens for i in range(args.passages)]
    prompts = {
        context: [tokens[end - context + args.new_tokens : end] for end in ends]
        for context in contexts
    }
    outputs, rows = {}, []
    for name, settings in variants(args).items():
        accepted, found = measured(settings, prompts, contexts[1], args.new_tokens)
        outputs.setdefault("plain", found)
        same = {c: found[c] == outputs["plain"][c] for c in contexts}
        if settings is None:
            continue
        for context in contexts:
            row = {"variant": name, "context_tokens": context}
            row |= {"acceptance_length": accepted[context], "same": same[context]}
            rows.append(row)
        lengths = "".join(f"{accepted[context]:>8.2f}" for context in contexts)
        print(f"{name:<34}{lengths}  same output: {same}", flush=True)
    document = {"results": rows, "provenance": provenance.collect(vars(args))}
    Path(args.output).write_text(json.dumps(document, indent=2) + "\n")


def variants(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """vLLM's ``speculative_config`` of each; None is plain vLLM."""
    ours = {
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "model": args.drafter,
        "num_speculative_tokens": args.num_speculative_tokens,
        "kv_budget": args.kv_budget,
        "recent_window": args.recent_window,
    }
    found: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "absolute, keep_all": ours | {"eviction_policy": "keep_all"},
    }
    for policy in ("chunk_retrieval", "heavy_hitter", "sink_window"):
        for mode in ("absolute", "cache_relative"):
            changes = {"eviction_policy": policy, "position_mode": mode}
            found[f"{mode}, {policy}"] = ours | changes
    return found


def measured(
    settings: dict[str, Any] | None,
    prompts: dict[int, list[list[int]]],
    max_model_len: int,
    new_tokens: int,
) -> tuple[dict[int, float], dict[int, list[list[int]]]]:
    """Acceptance length and outputs, by context."""
    from vllm_budgetdraft.comparison.engine_process import EngineProcess

    engine_args = {
        "model": TARGET,
        "dtype": "float32",
        "max_model_len": max_model_len + 16,  # to the last token with drafts
        "max_num_seqs": 1,
        "enforce_eager": True,
        "speculative_config": settings,
    }
    sampling = {"temperature": 0.0, "max_tokens": new_tokens, "ignore_eos": True}
    lengths, outputs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        with EngineProcess(engine_args, Path(folder) / "engine.log") as engine:
            for context, passages in prompts.items():
                runs = [engine.generate(passage, sampling) for passage in passages]
                drafts = sum(run.num_drafts for run in runs)
                accepted = sum(sum(run.accepted_per_position) for run in runs)
                lengths[context] = 1 + accepted / max(drafts, 1)
                outputs[context] = [run.token_ids for run in runs]
    return lengths, outputs


if __name__ == "__main__":
    main()
