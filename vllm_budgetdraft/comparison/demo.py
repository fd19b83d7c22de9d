"""``budgetdraft demo``: a chat model in vLLM, with and without BudgetDraft."""

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_budgetdraft import provenance
from vllm_budgetdraft.comparison import measure
from vllm_budgetdraft.comparison.engine_process import preload
from vllm_budgetdraft.comparison.methods import Method, all_methods
from vllm_budgetdraft.comparison.summary import same, summarise
from vllm_budgetdraft.config import parse_speculative_config, settle
from vllm_budgetdraft.drafter.join import of_target
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.fetch import pretrained_pair
from vllm_budgetdraft.files import write_text

if TYPE_CHECKING:
    from vllm_budgetdraft.comparison.prompts import Prompt


def run(args: Namespace) -> None:
    """Measures, prints answers and the table, and writes ``args.json``.

    Raises:
        ConfigurationError: one of target and drafter is named; see also
            ``pretrained_pair`` and ``chats``.
    """
    if (args.target is None) != (args.drafter is None):
        raise ConfigurationError(
            f"--target {args.target} with --drafter {args.drafter}: a drafter is one "
            "for its target; name both, or neither for the pretrained pair"
        )
    if args.target is None:
        args.target, args.drafter = map(str, pretrained_pair("smollm2"))
    measure.prepare_environment()
    preload()
    from transformers import AutoTokenizer

    from vllm_budgetdraft.comparison.chats import questions_about_texts, short_chats

    tokenizer = of_target(args.target, AutoTokenizer.from_pretrained)
    methods = all_methods(
        ["ngram", "draft_model", "budgetdraft"],
        drafter=args.drafter,
        lengths=[args.num_speculative_tokens],
        budgets=[args.kv_budget],
        policies=[args.eviction_policy],
    )
    prompts = short_chats(tokenizer, args.repeats)
    for length in sorted(args.context_tokens):
        prompts += questions_about_texts(tokenizer, length, args.repeats)
    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": max(p.context_tokens for p in prompts) + args.new_tokens,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = measure.RoundsFile(Path(folder) / "rounds.jsonl")
        measure.measure(
            methods,
            prompts,
            engine_args,
            file,
            new_tokens=args.new_tokens,
            temperatures=[0.0],
            engines_at_once=len(methods),
            profiles=False,
            ignore_eos=False,
        )
        rounds = file.read()
    results = [
        row
        | _draft_kv_bytes(
            method,
            row["context_tokens"] + args.new_tokens,
            measure.SHARED_ENGINE_ARGS | engine_args,
            args.drafter,
        )
        for method in methods
        for row in summarise([method], rounds)
    ]
    results.sort(key=lambda row: row["context_tokens"])
    answers = _answers(tokenizer, prompts, rounds, methods[-1].name)
    print_answers(answers)
    print_table(results)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if not callable(v)}
        settings["engine_args"] = engine_args
        document = {
            "results": results,
            "answers": answers,
            "provenance": provenance.collect(settings),
        }
        write_text(Path(args.json), json.dumps(document, indent=2) + "\n")
        print(f"Written to {args.json}.")


def _answers(
    tokenizer: Any, prompts: list["Prompt"], rounds: list[dict[str, Any]], method: str
) -> list[dict[str, Any]]:
    """A method's answer to the first prompt of each kind and length."""
    found = []
    for prompt, each in zip(prompts, rounds, strict=True):
        if prompt.index == 0:
            found.append(
                {
                    "context_tokens": len(prompt.token_ids),
                    "prompt": tokenizer.decode(prompt.token_ids),
                    "answer": tokenizer.decode(
                        each["runs"][method]["token_ids"], skip_special_tokens=True
                    ),
                }
            )
    return found


def print_answers(answers: list[dict[str, Any]]) -> None:
    for each in answers:
        # Of a long text its end, where the question is.
        print(f"\n--- {each['context_tokens']} tokens, ending with:\n")
        print(f"{each['prompt'][-200:].strip()}\n{each['answer'].strip()}")


def print_table(results: list[dict[str, Any]]) -> None:
    """The results as people read them."""
    titles = (
        f"{'prompt':<17}{'method':<44}{'tok/s':>6}{'speed-up':>10}{'decode':>8}"
        f"{'accept.':>9}  {'draft KV':>9}{'of full':>8}  {'same':<8}{'repeats':>7}"
    )
    print(f"\n{titles}\n{'-' * len(titles)}")
    for row in results:
        prompt = f"{row['task']}, {row['context_tokens']}"
        print(
            f"{prompt:<17}{row['method']:<44}"
            f"{row['output_throughput']:>6.0f}{row['speedup']:>9.2f}x"
            f"{row['decode_speedup']:>7.2f}x{_draft_columns(row):<26}   "
            f"{same(row):<8}{1 - row['distinct_4grams']:>7.0%}"
        )
    print(
        "\nprompt: its kind and tokens; tok/s: new tokens over the whole time of a "
        "request, prompt included;\nspeed-up: of the same, median over prompts; "
        "decode: speed-up after the first token; accept.:\nacceptance length, with "
        "the bonus token; same: every token equals plain vLLM's, or how many\noutputs "
        "part at a tie within rounding; repeats: runs of four tokens that the answer "
        "had before."
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
    from vllm_budgetdraft.drafter.configuration import read_drafter_config, trained_view
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
        settle(config, trained_view(drafter_config)),
        drafter_config,
        num_slots=engine_args["max_num_seqs"],
        max_model_len=max_model_len,
        dtype=dtype,
    )
    full = num_tokens * plan.bytes_per_token
    held = plan.cache_per_request if method.kind == "budgetdraft" else full
    return {"draft_kv_bytes_per_request": held, "full_draft_kv_bytes": full}
