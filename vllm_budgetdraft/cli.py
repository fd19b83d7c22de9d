"""``budgetdraft``: the command line."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_budgetdraft import __version__
from vllm_budgetdraft.command_line import at_least, told, with_homes
from vllm_budgetdraft.errors import BudgetDraftError, ConfigurationError
from vllm_budgetdraft.files import MODELS

#: Commands that a module of their own defines, which imports nothing heavy before it
#: runs: where it is, and what it is for.
MODULES = {
    "fetch": ("fetch", "make a pretrained target and its drafter, once"),
    "vocabulary": (
        "training.make_vocabulary",
        "choose the tokens that a drafter drafts by what its target writes",
    ),
    "join": ("drafter.join", "add a target's embeddings to layers that were trained"),
    "convert-flexdraft": (
        "flexdraft.convert",
        "take over a drafter as FlexDraft's authors release them",
    ),
    "generate": ("generation", "have a target write on from texts, for training"),
    "evaluate": (
        "comparison.evaluate",
        "measure vLLM's speculative methods side by side, and write a report",
    ),
    "report": ("comparison.report", "put several results of evaluate on one page"),
    "check": (
        "diagnosis.check",
        "whether a drafter fits a target, what it takes, and what it brings",
    ),
    "env": ("diagnosis.env", "what is installed, and what would run on this machine"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand; what a user can mend ends it with status 2, no traceback."""
    with told("budgetdraft"):
        parser = build_parser()
        words = with_homes(sys.argv[1:] if argv is None else argv)
        args, rest = parser.parse_known_args(words)
        if rest and not args.takes_rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
        _require_embedded_pair(args)
        try:
            args.run(args)
        except ModuleNotFoundError as error:
            # Only a whole package can have been left out; part of one is a fault.
            if error.name is None or "." in error.name:
                raise
            raise BudgetDraftError(
                f"{error.name} is not installed; pip install "
                "'vllm-budgetdraft[gpu,train,bench]' brings what the commands need, "
                "with cpu for gpu where no NVIDIA GPU is"
            ) from error


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
    _add_pad_target(commands)
    for name, (module_name, purpose) in MODULES.items():
        module = import_module(f"vllm_budgetdraft.{module_name}")
        command = commands.add_parser(
            name,
            help=purpose,
            description=module.__doc__,
            formatter_class=ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, takes_rest=False)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="compare vLLM with and without BudgetDraft, on a chat model",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--target", help="a chat model; without, the pair of budgetdraft fetch smollm2"
    )
    demo.add_argument("--drafter", help="for that target")
    demo.add_argument("--num-speculative-tokens", type=at_least(1), default=2)
    demo.add_argument("--kv-budget", type=at_least(1), default=512)
    demo.add_argument("--eviction-policy", default="chunk_retrieval")
    demo.add_argument(
        "--context-tokens", type=at_least(1), nargs="+", default=[1024, 4096]
    )
    demo.add_argument("--new-tokens", type=at_least(1), default=64)
    demo.add_argument(
        "--repeats", type=at_least(1), default=2, help="prompts of each kind and length"
    )
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


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a drafter for a target; every option of "
        "python -m vllm_budgetdraft.training",
        add_help=False,
    )
    train.set_defaults(run=_train, takes_rest=True)


def _add_pad_target(commands: Any) -> None:
    pad = commands.add_parser(
        "pad-target",
        help="grow a small Llama into a larger one with the same logits, to measure "
        "speed at its cost",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    pad.add_argument("--target", default=str(MODELS / "books-9m"))
    size = pad.add_mutually_exclusive_group()
    size.add_argument(
        "--size",
        choices=["150m", "1b", "7b", "7b-gqa"],
        default="150m",
        help="shapes for the embedded target",
    )
    size.add_argument(
        "--parameters",
        metavar="COUNT",
        help="7b, 1.5b, 350m or a plain number: a shape, within 2 %% of that, derived "
        "for any Llama without biases",
    )
    pad.add_argument("--output", required=True, metavar="FOLDER")
    pad.set_defaults(run=_pad_target, takes_rest=False)


def _pad_target(args: Namespace) -> None:
    from vllm_budgetdraft.evaluation.cost_padding import run

    run(args)


def _train(args: Namespace) -> None:
    from vllm_budgetdraft.training.__main__ import main as train

    train(args.rest)
