"""``budgetdraft evaluate``: every method a user of vLLM would think of, in one run."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from vllm_budgetdraft.cli import MODELS
from vllm_budgetdraft.comparison.methods import KINDS, default_kinds, has_suffix
from vllm_budgetdraft.errors import ConfigurationError

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
        "--output", required=True, help="folder; a run that was cut short goes on there"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="short")
    parser.add_argument("--context-tokens", type=int, nargs="+")
    parser.add_argument("--kv-budgets", type=int, nargs="+")
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+")
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
        help="texts of the tasks books, qmsum and summary: files, folders, dataset "
        "names; without it books and summary read an excerpt that comes along",
    )
    parser.add_argument("--unwrap-lines", action="store_true", help="of books")
    parser.add_argument("--prompts", type=int, default=5, help="of a task and context")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32"
    )
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help="JSON, of vLLM's LLM"
    )
    parser.add_argument(
        "--engines-at-once",
        type=int,
        default=4,
        help="that take turns with plain vLLM's; fewer where memory is short",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[],
        help="also behind vllm serve, with so many requests at a time: the first "
        "task's prompts of the shortest context",
    )
    parser.add_argument(
        "--serving-repeats", type=int, default=3, help="each with new servers"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: Namespace) -> None:
    """Writes rounds as they are done, then results.json, results.csv, report.html.

    Raises:
        ConfigurationError: see ``all_methods``, ``build_prompts`` and ``measure``; or
            the folder holds what other settings wrote.
    """
    from vllm_budgetdraft.comparison import measure
    from vllm_budgetdraft.vllm_integration.engine_process import preload

    measure.prepare_environment()
    preload()
    from transformers import AutoConfig, AutoTokenizer

    from vllm_budgetdraft.comparison import report
    from vllm_budgetdraft.comparison.methods import all_methods
    from vllm_budgetdraft.comparison.prompts import EXCERPT, build_prompts
    from vllm_budgetdraft.comparison.serving import measure_serving
    from vllm_budgetdraft.comparison.summary import summarise
    from vllm_budgetdraft.evaluation import provenance

    for name, value in PROTOCOLS[args.protocol].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        target = AutoConfig.from_pretrained(args.target)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"--target {args.target!r} cannot be read ({error}); give a folder or a "
            "name on the hub"
        ) from error
    longest = max(args.context_tokens) + args.new_tokens
    if longest > target.max_position_embeddings:
        raise ConfigurationError(
            f"--context-tokens {max(args.context_tokens)} and --new-tokens "
            f"{args.new_tokens} exceed the target's {target.max_position_embeddings} "
            "positions (max_position_embeddings); use shorter ones"
        )
    methods = all_methods(
        args.methods or default_kinds(),
        drafter=args.drafter,
        lengths=args.num_speculative_tokens,
        budgets=sorted(args.kv_budgets),
        policies=args.eviction_policies,
    )
    sources = _sources(args.data) or {"books": str(EXCERPT), "summary": str(EXCERPT)}
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = build_prompts(
        tokenizer,
        sources,
        lengths=sorted(args.context_tokens),
        count=args.prompts,
        unwraps_lines=args.unwrap_lines,
        seed=args.seed,
    )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    provenance.check_settings(output / SETTINGS, settings)
    file = measure.RoundsFile(output / ROUNDS)
    begun = provenance.collect(settings)
    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": longest,
        **args.engine_args,
    }
    measure.measure(
        methods,
        prompts,
        engine_args,
        file,
        new_tokens=args.new_tokens,
        temperature=args.temperature,
        engines_at_once=args.engines_at_once,
    )
    served = []
    if args.concurrency:
        same = (prompts[0].task, prompts[0].context_tokens)
        some = [p for p in prompts if (p.task, p.context_tokens) == same]
        served = measure_serving(
            methods,
            [tokenizer.decode(prompt.token_ids) for prompt in some],
            # A prompt that is sent as text may become some tokens longer.
            {**engine_args, "max_model_len": target.max_position_embeddings},
            output,
            concurrencies=sorted(args.concurrency),
            repeats=args.serving_repeats,
            new_tokens=args.new_tokens,
            temperature=args.temperature,
        )
    document = {
        "results": summarise(methods, file.read()),
        "serving": served,
        "notes": _notes(args, methods, sources, target),
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


def _notes(
    args: Namespace, methods: list[Any], sources: dict[str, str], target: Any
) -> list[str]:
    """What a reader must know to judge the numbers."""
    import torch

    notes = []
    if padded := getattr(target, "cost_padded", None):
        notes.append(
            f"The target is {padded['from']} padded to the cost of {padded['to']} "
            "parameters: its texts and acceptance are those of the small model, its "
            "time and memory those of the large one."
        )
    kinds = {method.kind for method in methods}
    if not has_suffix():
        notes.append("vLLM's suffix decoding is not installed, and was not measured.")
    if "ngram" not in kinds:
        notes.append(
            "No n-gram drafter was measured: how much repetitions alone would bring is "
            "not known."
        )
    if "qmsum" not in sources:
        notes.append("No meetings (QMSum) were given.")
    if not torch.cuda.is_available():
        notes.append(
            "Measured on a CPU, where vLLM schedules synchronously, plain or not."
        )
    if args.engine_args.get("enforce_eager"):
        notes.append(
            "All engines have enforce_eager: vLLM compiles nothing, which slows plain "
            "vLLM most."
        )
    if args.temperature:
        notes.append(
            f"At temperature {args.temperature:g} outputs are equal in distribution "
            "only; they are compared all the same."
        )
    return notes
