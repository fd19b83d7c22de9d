"""``budgetdraft generate``: the target writes on from real text, for training.

Of conversations it writes the assistant's turns anew, each after those that it wrote
before. On-policy text is what a drafter meets when it serves. What the target writes
greedily is its own label; with ``--top-logprobs`` the likeliest tokens of each position
are stored too, and training need not ask the target again. With ``--teacher-forced``
they are stored of the texts as they are.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from random import Random
from typing import Any

from vllm_budgetdraft import provenance
from vllm_budgetdraft.command_line import at_least, json_object, when_interrupted
from vllm_budgetdraft.drafter.join import of_target
from vllm_budgetdraft.errors import BudgetDraftError, ConfigurationError
from vllm_budgetdraft.files import claimed
from vllm_budgetdraft.generation.parts import missing_parts, write_part

SETTINGS = "generation.json"
#: Options that may differ when a run goes on.
OF_THE_MACHINE = {"output", "max_num_seqs", "engine_args", "run", "takes_rest", "rest"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--target", required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--texts", nargs="+", help="as training's: files, folders, names"
    )
    source.add_argument(
        "--conversations",
        nargs="+",
        help="the same, of rows with messages (OpenAI), conversations (ShareGPT) or "
        "turns (MT-bench)",
    )
    parser.add_argument(
        "--chat-template", help="file, or the template itself, in place of the target's"
    )
    parser.add_argument(
        "--max-model-len",
        type=at_least(1),
        help="tokens of a conversation, the answer included; the target's own limit if "
        "left out",
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
        help="of texts, how many prompts of which length",
    )
    parser.add_argument(
        "--new-tokens", type=at_least(1), default=256, help="at most, of each answer"
    )
    parser.add_argument(
        "--temperature",
        type=at_least(0.0),
        nargs="+",
        default=[0.0],
        help="everything is written once at each",
    )
    parser.add_argument(
        "--top-logprobs", type=at_least(0), default=0, help="stored of each position"
    )
    parser.add_argument(
        "--teacher-forced",
        action="store_true",
        help="store what the target says of the texts' own next tokens",
    )
    parser.add_argument(
        "--prompts-per-file",
        type=at_least(1),
        default=256,
        help="or conversations",
    )
    parser.add_argument("--max-num-seqs", type=at_least(1), default=128)
    parser.add_argument(
        "--engine-args", type=json_object, default={}, help="JSON, of vLLM's LLM"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: Namespace) -> None:
    """Writes ``part-*.parquet``, one after the other, each complete or not there.

    Raises:
        ConfigurationError: the folder holds what other settings wrote, or another
            process writes to it; the texts are shorter than the prompts, or options do
            not fit each other; see also ``chats.run``.
    """
    if args.teacher_forced and not args.top_logprobs:
        raise ConfigurationError(
            "--teacher-forced stores nothing without --top-logprobs; set it to 32, say"
        )
    if args.teacher_forced and args.conversations:
        raise ConfigurationError(
            "--teacher-forced is of --texts, and --conversations are written anew; "
            "leave it out"
        )
    output = Path(args.output)
    settings = {k: v for k, v in vars(args).items() if k not in OF_THE_MACHINE}
    advice = f"the files in {output} are complete: the same command writes the others"
    with claimed(output), when_interrupted(lambda: advice):
        provenance.keep_settings(output / SETTINGS, settings)
        try:
            _write_missing(args, output)
        except BudgetDraftError:
            if not any(output.glob("part-*.parquet")):  # nothing is of these settings
                (output / SETTINGS).unlink()
            raise


def _write_missing(args: Namespace, output: Path) -> None:
    if args.conversations:
        from vllm_budgetdraft.generation import chats

        chats.run(args, output)
    else:
        _of_texts(args, output)


def _of_texts(args: Namespace, output: Path) -> None:
    lengths = _lengths(args)
    parts = missing_parts(lengths, args.prompts_per_file, output)
    if not parts:
        return
    from transformers import AutoTokenizer

    from vllm_budgetdraft.generation.engine import Engine
    from vllm_budgetdraft.training.sources import read_texts
    from vllm_budgetdraft.training.token_streams import TokenStream

    texts = read_texts(
        args.texts,
        of_target(args.target, AutoTokenizer.from_pretrained),
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
    draws = any(args.temperature)
    engine = Engine(args, max(lengths) + args.new_tokens + 1, draws=draws)
    for path, of_part in parts.items():
        rng = Random(f"{args.seed} {path.name}")
        prompts = [_prompt(stream, length + more, rng) for length in of_part]
        seed = rng.randrange(2**31)
        if args.teacher_forced:
            found = zip(prompts, engine.read(prompts), strict=True)
            rows = [
                {
                    "prompt": tokens[: -args.new_tokens],
                    "continuation": tokens[-args.new_tokens :],
                    "temperature": 1.0,
                    **top,
                }
                for tokens, top in found
            ]
        else:
            rows = []
            for temperature in args.temperature:
                seeds = [seed + index for index in range(len(prompts))]
                same = [temperature] * len(prompts)
                written = engine.write(prompts, same, seeds)
                rows += [
                    each.row(prompt, temperature)
                    for prompt, each in zip(prompts, written, strict=True)
                ]
        write_part(path, rows, args.top_logprobs)


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
    if not lengths:
        raise ConfigurationError(
            f"--prompts {' '.join(args.prompts)} asks for none; write for example "
            "1024:500"
        )
    Random(args.seed).shuffle(lengths)
    return lengths


def _prompt(stream: Any, length: int, rng: Random) -> list[int]:
    start = rng.randrange(stream.num_tokens - length + 1)
    return [
        int(token)
        for row, part in stream.pieces(start, start + length)
        for token in row["input_ids"][part]
    ]
