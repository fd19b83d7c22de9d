"""``budgetdraft evaluate``: every method a user of vLLM would think of, in one run."""

import sys
from argparse import ArgumentParser, Namespace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_budgetdraft.command_line import at_least, json_object, when_interrupted
from vllm_budgetdraft.comparison.methods import KINDS, default_kinds
from vllm_budgetdraft.errors import ConfigurationError, short
from vllm_budgetdraft.files import MODELS, claimed

if TYPE_CHECKING:
    from vllm_budgetdraft.comparison.prompts import Prompt

#: What options are where they are not given. "paper" is BudgetDraft's section 4, with
#: draft lengths that are swept as there; "short" takes some minutes on a CPU.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "short": {
        "context_tokens": [1024, 4096],
        "kv_budgets": [512],
        "num_speculative_tokens": [8],
    },
    "paper": {
        "context_tokens": [4096, 8192, 16384],
        "kv_budgets": [256, 512, 1024, 2048],
        "num_speculative_tokens": [5, 10, 20],
    },
}
#: What may differ when a run goes on.
MAY_CHANGE = {
    *("output", "protocol", "concurrency", "serving_repeats"),
    *("run", "takes_rest", "rest"),
}
SETTINGS, ROUNDS = "run.json", "rounds.jsonl"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--target", default=str(MODELS / "books-9m"))
    parser.add_argument("--drafter", default=str(MODELS / "books-9m-drafter"))
    parser.add_argument(
        "--output",
        help="folder; a run that was cut short goes on there. Without it a new one, "
        "evaluation-DATE-TIME",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="short")
    parser.add_argument("--context-tokens", type=at_least(1), nargs="+")
    parser.add_argument("--kv-budgets", type=at_least(1), nargs="+")
    parser.add_argument("--num-speculative-tokens", type=at_least(1), nargs="+")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join(KINDS)}; without it all that can be had here",
    )
    parser.add_argument(
        "--eviction-policies", nargs="+", default=["chunk_retrieval"], metavar="POLICY"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="TASK=SOURCE",
        help="what the tasks books, qmsum, summary and chat read: files, folders, "
        "dataset names; without it books and summary read an excerpt that comes along",
    )
    templates = parser.add_mutually_exclusive_group()
    templates.add_argument(
        "--chat-template",
        metavar="FILE",
        help="in place of the one that the target's tokenizer has, if any",
    )
    templates.add_argument(
        "--skip-chat-template",
        action="store_true",
        help="prompts are plain text, and no output ends before --new-tokens",
    )
    parser.add_argument("--unwrap-lines", action="store_true", help="of books")
    parser.add_argument(
        "--prompts", type=at_least(1), default=5, help="of a task and context"
    )
    parser.add_argument(
        "--new-tokens",
        type=at_least(1),
        default=256,
        help="at most, in a chat template",
    )
    parser.add_argument(
        "--temperature",
        type=at_least(0.0),
        nargs="+",
        default=[0.0],
        help="each is measured; above 0, requests have no seed",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32"
    )
    parser.add_argument(
        "--engine-args", type=json_object, default={}, help="JSON, of vLLM's LLM"
    )
    parser.add_argument(
        "--engines-at-once",
        type=at_least(1),
        default=4,
        help="that take turns with plain vLLM's; fewer where memory is short",
    )
    parser.add_argument(
        "--concurrency",
        type=at_least(1),
        nargs="+",
        default=[],
        help="also behind vllm serve, with so many requests at a time: each task's "
        "prompts of its shortest context",
    )
    parser.add_argument(
        "--serving-repeats", type=at_least(1), default=3, help="each with new servers"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: Namespace) -> None:
    """Writes rounds as they are done, then results.json, results.csv, report.html.

    Raises:
        BudgetDraftError: see ``all_methods``, ``set_chat_template``,
            ``build_prompts``, ``check_engine`` and ``measure``; the contexts are too
            long; the folder holds what other settings wrote, or another process writes
            to it.
    """
    output = Path(args.output or f"evaluation-{datetime.now():%Y-%m-%d-%H%M%S}")
    again = "the same command"
    if not args.output:
        print(f"Results go to {output}.", file=sys.stderr)
        again += f" with --output {output}"
    advice = f"what was measured is in {output}: {again} goes on there"
    with claimed(output), when_interrupted(lambda: advice):
        _evaluate(args, output)


def _evaluate(args: Namespace, output: Path) -> None:
    from vllm_budgetdraft.comparison import measure
    from vllm_budgetdraft.comparison.engine_process import preload

    measure.prepare_environment()
    preload()
    from transformers import AutoConfig, AutoTokenizer

    from vllm_budgetdraft import provenance
    from vllm_budgetdraft.comparison import report
    from vllm_budgetdraft.comparison.engines import check_engine
    from vllm_budgetdraft.comparison.methods import all_methods
    from vllm_budgetdraft.comparison.notes import Circumstances, notes
    from vllm_budgetdraft.comparison.prompts import EXCERPT, build_prompts
    from vllm_budgetdraft.comparison.serving import measure_serving
    from vllm_budgetdraft.comparison.summary import summarise
    from vllm_budgetdraft.conversations import set_chat_template

    for name, value in PROTOCOLS[args.protocol].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    temperatures = sorted(set(args.temperature))
    try:
        target = AutoConfig.from_pretrained(args.target)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"--target {args.target!r} cannot be read ({short(error)}); give a "
            "folder or a name on the hub"
        ) from error
    longest = max(args.context_tokens) + args.new_tokens
    if longest > target.max_position_embeddings:
        raise ConfigurationError(
            f"--context-tokens {max(args.context_tokens)} and --new-tokens "
            f"{args.new_tokens} exceed the target's {target.max_position_embeddings} "
            "positions (max_position_embeddings); use shorter ones"
        )
    methods = all_methods(
        args.methods or default_kinds(args.drafter),
        drafter=args.drafter,
        lengths=args.num_speculative_tokens,
        budgets=sorted(args.kv_budgets),
        policies=args.eviction_policies,
    )
    sources = _sources(args.data) or {"books": str(EXCERPT), "summary": str(EXCERPT)}
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    if args.chat_template:
        set_chat_template(tokenizer, args.chat_template)
    in_template = bool(tokenizer.chat_template) and not args.skip_chat_template
    said: list[str] = []
    prompts = build_prompts(
        tokenizer,
        sources,
        lengths=sorted(args.context_tokens),
        count=args.prompts,
        unwraps_lines=args.unwrap_lines,
        uses_template=not args.skip_chat_template,
        tell=said.append,
        seed=args.seed,
    )
    for line in said:
        print(line, file=sys.stderr)
    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": longest,
        **args.engine_args,
    }
    settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    provenance.check_settings(output / SETTINGS, settings)
    for method in methods:
        check_engine({**engine_args, **method.engine_args})
    provenance.keep_settings(output / SETTINGS, settings)
    file = measure.RoundsFile(output / ROUNDS)
    begun = provenance.collect(settings)
    measure.measure(
        methods,
        prompts,
        engine_args,
        file,
        new_tokens=args.new_tokens,
        temperatures=temperatures,
        engines_at_once=args.engines_at_once,
        # In a chat template an answer has an end, and what follows it is no text.
        ignore_eos=not in_template,
    )
    served = []
    if args.concurrency:
        served = measure_serving(
            methods,
            _shortest(prompts, tokenizer),
            # A prompt that is sent as text may become some tokens longer.
            {**engine_args, "max_model_len": target.max_position_embeddings},
            output,
            concurrencies=sorted(args.concurrency),
            repeats=args.serving_repeats,
            new_tokens=args.new_tokens,
            temperatures=temperatures,
            ignore_eos=not in_template,
        )
    circumstances = Circumstances(
        methods=methods,
        tasks=list(sources),
        temperatures=temperatures,
        chat_template=(args.chat_template or args.target) if in_template else None,
        cost_padded=getattr(target, "cost_padded", None),
        enforce_eager=bool(args.engine_args.get("enforce_eager")),
    )
    document = {
        "results": summarise(methods, file.read()),
        "serving": served,
        "chat_template": circumstances.chat_template,
        "notes": [*said, *notes(circumstances)],
        "provenance": begun,
    }
    report.write(output, document)


def _sources(given: list[str]) -> dict[str, str]:
    found = {}
    for each in given:
        task, equals, source = each.partition("=")
        if not equals:
            raise ConfigurationError(
                f"--data {each!r} is not TASK=SOURCE; write for example books=FILE"
            )
        found[task] = source
    return found


def _shortest(
    prompts: list["Prompt"], tokenizer: Any
) -> dict[tuple[str, int], list[str]]:
    """Texts of each task's shortest context, by both."""
    shortest: dict[str, int] = {}
    for each in prompts:
        known = shortest.get(each.task, each.context_tokens)
        shortest[each.task] = min(known, each.context_tokens)
    return {
        (task, length): [
            tokenizer.decode(each.token_ids)
            for each in prompts
            if (each.task, each.context_tokens) == (task, length)
        ]
        for task, length in shortest.items()
    }
