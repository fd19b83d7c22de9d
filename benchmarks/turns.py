"""What a drafter that remembers saves: conversations, and calls with one instruction.

    python -m benchmarks.turns --target TARGET --drafter DRAFTER \\
        --books /path/to/books/test.jsonl.xz --output results/turns.json

Two engines take turns at each request: one keeps snapshots, as by default, and one
reads every context anew. Conversations are about a passage of a book; the calls of an
agent share a passage for their instructions, and ask about it differently. What the
engine wrote is sent back as text, in the chat template, as a client does.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_budgetdraft import provenance
from vllm_budgetdraft.comparison.measure import prepare_environment
from vllm_budgetdraft.evaluation.acceptance import passages
from vllm_budgetdraft.training.sources import read_texts

#: Of speculation and of vLLM, settings that tell the engines apart.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "snapshots": ({}, {}),
    "anew": ({"snapshot_memory_gib": 0}, {}),
}
#: One more, on request, whose target computes every context anew, too.
UNCACHED = {"uncached": ({}, {"enable_prefix_caching": False})}
QUESTIONS = [
    "What happens in this passage?",
    "Who are the people in it, and what does each of them want?",
    "Which sentence of the passage says most about the first of them?",
    "Describe the place where it happens.",
    "How does the author feel about what happens? Give reasons.",
    "Write what could happen next, in the words of the author.",
]
CALLS = [
    *("Name one person of the text.", "Name a place of the text."),
    *("Is the text about a journey?", "Is anybody in it afraid?"),
    *("Summarize the beginning.", "Summarize the end."),
    *("Give the text a title.", "What is its mood?"),
    *("Who speaks first?", "Who speaks last?"),
    *("Name an object.", "Name an animal, if there is one."),
    *("What time of the day is it?", "What season is it?"),
    *("Which word is the strangest?", "Which sentence is the longest?"),
    *("Is it a letter?", "Is it a poem?"),
    *("For whom was it written?", "What is missing in it?"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--books", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--document-tokens", type=int, default=4096)
    parser.add_argument("--instruction-tokens", type=int, default=2048)
    parser.add_argument("--conversations", type=int, default=5)
    parser.add_argument("--loops", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--call-tokens", type=int, default=32)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--kv-budget", type=int, default=512)
    parser.add_argument(
        "--uncached",
        action="store_true",
        help="an engine without prefix cache, too: an EAGLE-3 head then reads all, "
        "where with one it reads only what its target computes",
    )
    args = parser.parse_args()
    if args.uncached:
        ENGINES.update(UNCACHED)
    prepare_environment()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    texts: Any = read_texts([args.books], tokenizer, unwraps_lines=True)

    def of_books(length: int, count: int, seed: int) -> list[str]:
        found = passages(texts, length, count, seed)
        return [tokenizer.decode(tokens) for tokens in found]

    documents = of_books(args.document_tokens, args.conversations, 0)
    instructions = of_books(args.instruction_tokens, args.loops, 1)
    longest = max(args.document_tokens + 2048, args.instruction_tokens + 512)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(engine(args, longest, *settings))
            for name, settings in ENGINES.items()
        }
        rng = random.Random(0)
        for index, document in enumerate(documents):
            rows += conversation(args, engines, tokenizer, document, index, rng)
        for index, instruction in enumerate(instructions):
            rows += agent(args, engines, tokenizer, instruction, index, rng)
    document = summary(rows) | {
        "rows": rows,
        "provenance": provenance.collect({**vars(args), "output": str(args.output)}),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1)
    args.output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(summary(rows), indent=1))


def engine(
    args: argparse.Namespace,
    longest: int,
    settings: dict[str, Any],
    more: dict[str, Any],
) -> ProcessPoolExecutor:
    speculative = {
        "method": "budgetdraft",
        "model": args.drafter,
        "num_speculative_tokens": args.num_speculative_tokens,
        "kv_budget": args.kv_budget,
        "adaptive_draft_length": False,
        **settings,
    }
    engine_args = {
        "model": args.target,
        "dtype": "float32",
        "max_model_len": longest,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "speculative_config": speculative,
        **more,
    }
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=start, initargs=(engine_args,))


def conversation(
    args: argparse.Namespace,
    engines: dict[str, ProcessPoolExecutor],
    tokenizer: Any,
    document: str,
    index: int,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Turns about a document; the first engine's answers go on."""
    messages: list[dict[str, str]] = []
    rows, known = [], 0
    for turn, question in enumerate(QUESTIONS):
        content = question if turn else f"{document}\n\n{question}"
        messages.append({"role": "user", "content": content})
        found = ask(args.new_tokens, engines, tokenizer, messages, rng)
        where = {"task": "conversation", "index": index, "turn": turn}
        for row in found:
            row["new_tokens"] = row["prompt_tokens"] - known
            rows.append(where | row)
        known = found[0]["prompt_tokens"] + found[0]["tokens"]
        messages.append({"role": "assistant", "content": found[0]["text"]})
    return rows


def agent(
    args: argparse.Namespace,
    engines: dict[str, ProcessPoolExecutor],
    tokenizer: Any,
    instruction: str,
    index: int,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Calls with the same instruction, and different questions."""
    system = {"role": "system", "content": instruction}
    shared = len(render(tokenizer, [system, {"role": "user", "content": ""}]))
    rows = []
    for turn, call in enumerate(CALLS):
        messages = [system, {"role": "user", "content": call}]
        for row in ask(args.call_tokens, engines, tokenizer, messages, rng):
            row["new_tokens"] = row["prompt_tokens"] - (shared if turn else 0)
            rows.append({"task": "agent", "index": index, "turn": turn} | row)
    return rows


def ask(
    new_tokens: int,
    engines: dict[str, ProcessPoolExecutor],
    tokenizer: Any,
    messages: list[dict[str, str]],
    rng: random.Random,
) -> list[dict[str, Any]]:
    """A request to each engine, in any order; the rows in the order of ``ENGINES``."""
    prompt = render(tokenizer, messages)
    found = {}
    for name in rng.sample(list(engines), len(engines)):
        found[name] = engines[name].submit(generate, prompt, new_tokens).result()
    rows = [{"engine": name} | found[name] for name in engines]
    shown = {k: v for k, v in rows[0].items() if k not in ("text", "token_ids")}
    print(shown, flush=True)
    same = all(row["token_ids"] == rows[0]["token_ids"] for row in rows)
    for row in rows:
        del row["token_ids"]
        row["output_identical"] = same
    return rows


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


_llm: Any


def start(engine_args: dict[str, Any]) -> None:
    global _llm
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    _llm = LLM(**engine_args, disable_log_stats=False)


def generate(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """What a request took, and what drafting did for it."""
    from vllm import SamplingParams

    before, begun = metrics(), time.perf_counter()
    (output,) = _llm.generate(
        {"prompt_token_ids": prompt},
        SamplingParams(temperature=0.0, max_tokens=new_tokens),
        use_tqdm=False,
    )
    seconds = time.perf_counter() - begun
    # Steps without requests tell of what the last one with them did.
    counted = metrics() - before
    drafts = counted["vllm:spec_decode_num_drafts_total"]
    accepted = counted["vllm:spec_decode_num_accepted_tokens_total"]
    read = "vllm_budgetdraft:tokens_to_read_total"
    waits = "vllm_budgetdraft:steps_to_first_draft"
    return {
        "prompt_tokens": len(prompt),
        "tokens": len(output.outputs[0].token_ids),
        "token_ids": list(output.outputs[0].token_ids),
        "text": output.outputs[0].text,
        "seconds": seconds,
        "tokens_read": counted[read],
        "steps_to_first_draft": counted[f"{waits}_sum"] if counted[waits] else None,
        "drafts": drafts,
        "accepted": accepted,
    }


def metrics() -> Counter[str]:
    """Of this process, summed over labels."""
    from prometheus_client import REGISTRY

    found: Counter[str] = Counter()
    for family in REGISTRY.collect():
        for metric in family.samples:
            found[metric.name] += metric.value
            if metric.name.endswith("_count"):
                found[metric.name.removesuffix("_count")] += metric.value
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of turns after the first, and of calls after the second."""
    found: dict[str, Any] = {}
    for task, first in (("conversation", 1), ("agent", 2)):
        later = [r for r in rows if r["task"] == task and r["turn"] >= first]
        by_engine = {
            name: [row for row in later if row["engine"] == name] for name in ENGINES
        }
        kept, anew = by_engine["snapshots"], by_engine["anew"]
        if not kept:
            continue
        found[task] = {
            "tokens_read_over_new_tokens": total(kept, "tokens_read")
            / total(kept, "new_tokens"),
            "tokens_read_anew_over_new_tokens": total(anew, "tokens_read")
            / total(anew, "new_tokens"),
            "acceptance_over_reading_anew": length(kept) / length(anew),
            "acceptance_length": length(kept),
            "seconds_over_reading_anew": statistics.median(
                a["seconds"] / b["seconds"] for a, b in zip(kept, anew, strict=True)
            ),
            "acceptance_length_by_engine": {
                name: length(some) for name, some in by_engine.items()
            },
            "median_seconds_by_engine": {
                name: statistics.median(row["seconds"] for row in some)
                for name, some in by_engine.items()
            },
            "outputs_identical": all(row["output_identical"] for row in later),
        }
    for name in ("tokens_read_over_new_tokens", "acceptance_over_reading_anew"):
        if "conversation" in found:
            found[name] = found["conversation"][name]
    return found


def total(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows)


def length(rows: list[dict[str, Any]]) -> float:
    """Acceptance length, the bonus token included."""
    return 1 + total(rows, "accepted") / total(rows, "drafts")


if __name__ == "__main__":
    main()
