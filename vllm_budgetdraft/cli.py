"""``budgetdraft``: the command line."""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from vllm_budgetdraft import __version__
from vllm_budgetdraft.errors import BudgetDraftError

#: Where the pair that comes with the repository lies, as seen from here.
MODELS = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "models"))


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand; a user's mistake ends it with status 2 and no traceback."""
    parser = ArgumentParser(prog="budgetdraft", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_generate(commands)
    _add_pad_target(commands)
    _add_evaluate(commands)
    _add_report(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        args.run(args)
    except BudgetDraftError as error:
        print(f"budgetdraft: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _add_demo(commands) -> None:  # type: ignore[no-untyped-def]
    demo = commands.add_parser(
        "demo",
        help="compare vLLM with and without BudgetDraft on pages of a novel",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--target", default=str(MODELS / "books-9m"))
    demo.add_argument("--drafter", default=str(MODELS / "books-9m-drafter"))
    demo.add_argument("--num-speculative-tokens", type=int, default=8)
    demo.add_argument("--kv-budget", type=int, default=512)
    demo.add_argument("--eviction-policy", default="chunk_retrieval")
    demo.add_argument("--context-tokens", type=int, nargs="+", default=[1024, 4096])
    demo.add_argument("--new-tokens", type=int, default=256)
    demo.add_argument("--repeats", type=int, default=5, help="passages per context")
    demo.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the target; in the 16-bit types vLLM's own argmax can tip when it "
        "verifies several tokens at once, under any speculative method",
    )
    demo.add_argument("--json", metavar="FILE", help="write the results there too")
    demo.set_defaults(run=_demo, takes_rest=False)


def _demo(args: Namespace) -> None:
    from vllm_budgetdraft.comparison.demo import run

    run(args)


def _add_train(commands) -> None:  # type: ignore[no-untyped-def]
    train = commands.add_parser(
        "train",
        help="train a drafter for a target; every option of "
        "python -m vllm_budgetdraft.training",
        add_help=False,
    )
    train.set_defaults(run=_train, takes_rest=True)


def _add_generate(commands) -> None:  # type: ignore[no-untyped-def]
    from vllm_budgetdraft import generation

    generate = commands.add_parser(
        "generate",
        help="have a target write on from texts, for training",
        description=generation.__doc__,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    generation.add_arguments(generate)
    generate.set_defaults(run=generation.run, takes_rest=False)


def _add_evaluate(commands) -> None:  # type: ignore[no-untyped-def]
    from vllm_budgetdraft.comparison import evaluate

    parser = commands.add_parser(
        "evaluate",
        help="measure vLLM's speculative methods side by side, and write a report",
        description=evaluate.__doc__,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_arguments(parser)
    parser.set_defaults(run=evaluate.run, takes_rest=False)


def _add_report(commands) -> None:  # type: ignore[no-untyped-def]
    from vllm_budgetdraft.comparison import report

    parser = commands.add_parser(
        "report",
        help="put several results of evaluate on one page",
        description=report.__doc__,
    )
    report.add_arguments(parser)
    parser.set_defaults(run=report.run, takes_rest=False)


def _add_pad_target(commands) -> None:  # type: ignore[no-untyped-def]
    pad = commands.add_parser(
        "pad-target",
        help="grow a small Llama into a larger one with the same logits, to measure "
        "speed at its cost",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    pad.add_argument("--target", default=str(MODELS / "books-9m"))
    pad.add_argument("--size", choices=["150m", "1b", "7b", "7b-gqa"], default="150m")
    pad.add_argument("--output", required=True, metavar="FOLDER")
    pad.set_defaults(run=_pad_target, takes_rest=False)


def _pad_target(args: Namespace) -> None:
    from vllm_budgetdraft.evaluation.cost_padding import run

    run(args)


def _train(args: Namespace) -> None:
    from vllm_budgetdraft.training.__main__ import main as train

    train(args.rest)
