"""``budgetdraft``: the command line."""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from vllm_budgetdraft import __version__
from vllm_budgetdraft.errors import BudgetDraftError, ConfigurationError

#: Where the pair that comes with the repository lies, as seen from here.
MODELS = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "models"))


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand; what a user can mend ends it with status 2, no traceback."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        _require_embedded_pair(args)
        args.run(args)
        return
    except BudgetDraftError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        # Only a whole package can have been left out; part of one is a fault.
        if error.name is None or "." in error.name:
            raise
        message = (
            f"{error.name} is not installed; pip install "
            "'vllm-budgetdraft[gpu,train,bench]' brings what the commands need, with "
            "cpu for gpu where no NVIDIA GPU is"
        )
    print(f"budgetdraft: {message}", file=sys.stderr)
    raise SystemExit(2)


def _require_embedded_pair(args: Namespace) -> None:
    """Raises ConfigurationError where a default is meant and only the package is."""
    for name in ("target", "drafter"):
        folder = Path(getattr(args, name, None) or ".")
        if folder.parent == MODELS and not folder.is_dir():
            raise ConfigurationError(
                f"--{name} {folder} is not there: the embedded pair comes with the "
                f"repository, not with the package; give --{name} a folder or a name "
                "on the hub"
            )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="budgetdraft", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_generate(commands)
    _add_pad_target(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_check(commands)
    _add_env(commands)
    return parser


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


def _add_check(commands) -> None:  # type: ignore[no-untyped-def]
    from vllm_budgetdraft.diagnosis import check

    parser = commands.add_parser(
        "check",
        help="whether a drafter fits a target, what it takes, and what it brings",
        description=check.__doc__,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    check.add_arguments(parser)
    parser.set_defaults(run=check.run, takes_rest=False)


def _add_env(commands) -> None:  # type: ignore[no-untyped-def]
    from vllm_budgetdraft.diagnosis import env

    parser = commands.add_parser(
        "env",
        help="what is installed, and what would run on this machine",
        description=env.__doc__,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    env.add_arguments(parser)
    parser.set_defaults(run=env.run, takes_rest=False)


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
