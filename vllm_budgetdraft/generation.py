"""``budgetdraft generate``: the target writes on from real text, for training.

On-policy text is what a drafter meets when it serves. What the target writes greedily
is its own label; with ``--top-logprobs`` the likeliest tokens of each position are
stored too, and training need not ask the target again. With ``--teacher-forced`` they
are stored of the texts as they are.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation import provenance

SETTINGS = "generation.json"
#: Options that may differ when a run goes on.
OF_THE_MACHINE = {"output", "max_num_seqs", "engine_args", "run", "takes_rest", "rest"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--target", required=True)
    parser.add_argument(
        "--texts", nargs="+", required=True, help="as training's: files, folders, names"
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--unwrap-lines", action="store_true")
    parser.add_argument(
        "--output", required=True, help="folder; a run that was cut short goes on there"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=["256:2000", "1024:1000", "3840:500"],
        metavar="TOKENS:COUNT",
        help="how many prompts of which length",
    )
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--top-logprobs", type=int, default=0, help="stored of each position"
    )
    parser.add_argument(
        "--teacher-forced",
        action="store_true",
        help="store what the target says of the texts' own next tokens",
    )
    parser.add_argument("--prompts-per-file", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help="JSON, of vLLM's LLM"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: Namespace) -> None:
    """Writes ``part-*.parquet``, one after the other, each complete or not there.

    Raises:
        ConfigurationError: the folder holds what other settings wrote, or the texts are
            shorter than the prompts.
    """
    if args.teacher_forced and not args.top_logprobs:
        raise ConfigurationError(
            "--teacher-forced stores nothing without --top-logprobs; set it to 32, say"
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in OF_THE_MACHINE}
    provenance.check_settings(output / SETTINGS, settings)
    lengths = _lengths(args)
    size = args.prompts_per_file
    parts = {
        output / f"part-{first // size:05}.parquet": lengths[first : first + size]
        for first in range(0, len(lengths), size)
    }
    missing = {path: each for path, each in parts.items() if not path.is_file()}
    print(f"{len(parts) - len(missing)} of {len(parts)} files are there already")
    if not missing:
        return
    from datasets import Dataset
    from transformers import AutoTokenizer

    from vllm_budgetdraft.training.data import TokenStream, read_texts

    texts = read_texts(
        args.texts,
        AutoTokenizer.from_pretrained(args.target),
        column=args.text_column,
        unwraps_lines=args.unwrap_lines,
    )
    stream = TokenStream(texts, ["input_ids"])
    more = args.new_tokens if args.teacher_forced else 0
    longest = max(lengths) + more
    if stream.num_tokens < longest:
        raise ConfigurationError(
            f"the texts have {stream.num_tokens} tokens, fewer than the {longest} of a "
            "prompt; give more texts, or shorter --prompts"
        )
    generate = _engine(args, max(lengths) + args.new_tokens)
    for path, of_part in missing.items():
        rng = Random(f"{args.seed} {path.name}")
        prompts = [_prompt(stream, length + more, rng) for length in of_part]
        rows = list(generate(prompts, rng.randrange(2**31)))
        unfinished = path.with_suffix(".unfinished")
        Dataset.from_list(rows).to_parquet(unfinished)
        unfinished.rename(path)
        print(f"{path}: {len(rows)} continuations", flush=True)


def _lengths(args: Namespace) -> list[int]:
    """Of every prompt, mixed."""
    lengths = []
    for part in args.prompts:
        length, _, count = part.partition(":")
        if not (length.isdigit() and count.isdigit() and int(length)):
            raise ConfigurationError(
                f"--prompts {part!r} is not TOKENS:COUNT; write for example 1024:500"
            )
        lengths += [int(length)] * int(count)
    Random(args.seed).shuffle(lengths)
    return lengths


def _prompt(stream: Any, length: int, rng: Random) -> list[int]:
    start = rng.randrange(stream.num_tokens - length + 1)
    return [
        int(token)
        for row, part in stream.pieces(start, start + length)
        for token in row["input_ids"][part]
    ]


def _engine(args: Namespace, longest: int) -> Any:
    """What makes rows of prompts."""
    from vllm_budgetdraft.comparison.measure import prepare_environment

    prepare_environment()
    from vllm import LLM, SamplingParams

    count = args.top_logprobs
    engine_args = {
        "max_model_len": longest + 1,
        "max_num_seqs": args.max_num_seqs,
        "enable_prefix_caching": False,
        "max_logprobs": max(1, count),
        **(_of_whole_prompts(longest) if args.temperature else {}),
        **args.engine_args,
    }
    llm = LLM(args.target, **engine_args)

    def generate(prompts: list[list[int]], seed: int) -> Iterator[dict[str, Any]]:
        if args.teacher_forced:
            sampling = SamplingParams(
                max_tokens=1, prompt_logprobs=count, detokenize=False
            )
        else:
            sampling = SamplingParams(
                temperature=args.temperature,
                max_tokens=args.new_tokens,
                logprobs=count or None,
                detokenize=False,
            )
        params = [sampling.clone() for _ in prompts]
        for index, each in enumerate(params):
            each.seed = seed + index if args.temperature else None
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        for prompt, result in zip(prompts, llm.generate(inputs, params), strict=True):
            output = result.outputs[0]
            start = len(prompt) - args.new_tokens
            if args.teacher_forced:
                written, positions = prompt[start:], result.prompt_logprobs[start:]
                prompt = prompt[:start]
            else:
                written, positions = list(output.token_ids), output.logprobs
            row = {
                "prompt": prompt,
                "continuation": written,
                "temperature": 1.0 if args.teacher_forced else args.temperature,
            }
            yield row | (_likeliest(positions, count) if count else {})

    return generate


def _of_whole_prompts(longest: int) -> dict[str, Any]:
    """On a CPU, a seeded request whose prompt is read in parts ends vLLM's engine."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, longest + 1),
    }


def _likeliest(positions: Any, count: int) -> dict[str, list[list[Any]]]:
    """Of vLLM's dictionaries, which also have the token that came next."""
    ids, logprobs = [], []
    for by_token in positions:
        ranked = sorted(by_token.items(), key=lambda item: item[1].rank)[:count]
        ids.append([token for token, _ in ranked])
        logprobs.append([each.logprob for _, each in ranked])
    return {"top_ids": ids, "top_logprobs": logprobs}
