"""Command lines of the documentation, taken apart and checked without being run."""

import importlib.util
import json
import re
import shlex
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from packaging.requirements import Requirement

from tests.support.pages import BLOCKS, ROOT
from vllm_budgetdraft.config import parse_speculative_config


def commands(script: str) -> Iterator[list[str]]:
    """Words of each command, without assignments before it and where it writes to."""
    # A comment takes the end of its line along, but not what follows.
    joined = script.replace("\\\n", " ").replace("\n", "\n;")
    lexer = shlex.shlex(joined, posix=True, punctuation_chars="|&;<>\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    words: list[str] = []
    for word in (each.replace("\n;", "\n") for each in [*lexer, "\n"]):
        if set(word) <= set("|&;\n"):
            while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
                words.pop(0)
            if words:
                yield words[: words.index(">")] if ">" in words else words
            words = []
        else:
            words.append(word)


def check_budgetdraft(words: list[str]) -> None:
    from vllm_budgetdraft.cli import build_parser

    args, rest = build_parser().parse_known_args(words)
    assert args.takes_rest or not rest, rest
    if args.takes_rest:
        check_training(rest)


def check_training(words: list[str]) -> None:
    from vllm_budgetdraft.training.config_files import with_config

    training_parser().parse_args(with_config(words))


@cache
def training_parser() -> Any:
    from transformers import HfArgumentParser

    from vllm_budgetdraft.training.__main__ import PARTS

    return HfArgumentParser(PARTS)


@cache
def vllm_parser() -> ArgumentParser:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers(required=True))
    return parser


def check_vllm(words: list[str]) -> None:
    args = vllm_parser().parse_args(words)
    if args.speculative_config:
        check_speculative_config(args.speculative_config)


def check_speculative_config(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    if settings.pop("method") == "budgetdraft":
        parse_speculative_config(settings)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert [word for word in words if "=" not in word], words
    for word in words:
        assert word in targets or "=" in word, f"no target {word!r}"


def check_pip(words: list[str]) -> None:
    assert words[0] in ("install", "uninstall"), words
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [word for word in words[1:] if not word.startswith("-")]
    for package in packages:
        named = package.replace(".[", "vllm-budgetdraft[")
        requirement = Requirement(named if named != "." else "vllm-budgetdraft")
        if requirement.name == "vllm-budgetdraft":
            assert requirement.extras <= set(project["optional-dependencies"])


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        if words[1] == "vllm_budgetdraft.training":
            return check_training(words[2:])
        if words[1] == "vllm.entrypoints.cli.main":
            return check_vllm(words[2:])
        assert importlib.util.find_spec(words[1]), f"no module {words[1]!r}"
    else:
        written = [block.text for block in BLOCKS if block.language == "python"]
        is_written = any(words[0] in text.split("\n")[0] for text in written)
        assert is_written or (ROOT / words[0]).is_file(), f"no file {words[0]!r}"
    return None


def check_curl(words: list[str]) -> None:
    urls = [word for word in words if word.startswith("http")]
    assert urls and all(url.startswith("http://localhost:") for url in urls)
    for option, value in zip(words, words[1:], strict=False):
        if option in ("-d", "--data"):
            json.loads(value)


def check_docker(words: list[str]) -> None:
    files = [b for a, b in zip(words, words[1:], strict=False) if a in ("-f", "--file")]
    assert words[0] == "compose" and files, words
    for file in files:
        assert (ROOT / file).is_file(), f"no file {file!r}"


def check_pytest(words: list[str]) -> None:
    for word in words:
        if not word.startswith("-") and "/" in word:
            assert (ROOT / word).exists(), f"nothing at {word!r}"


def check_nothing(words: list[str]) -> None:
    """What is neither ours nor vLLM's."""


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "budgetdraft": check_budgetdraft,
    "curl": check_curl,
    "docker": check_docker,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
    "python3": check_python,
    "vllm": check_vllm,
    **dict.fromkeys([".", "cd", "export", "git", "grep", "mkdir"], check_nothing),
}
