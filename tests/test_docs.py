"""The documentation says what the code does, and its commands would be accepted."""

import ast
import html
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml
from packaging.requirements import Requirement

from vllm_budgetdraft import environment, errors
from vllm_budgetdraft.config import (
    BudgetDraftConfig,
    EvictionSettings,
    RequestSettings,
    parse_speculative_config,
)
from vllm_budgetdraft.eviction.base import PromptStates, check_selection
from vllm_budgetdraft.eviction.catalogue import POLICIES, make_policy
from vllm_budgetdraft.vllm_integration import statistics
from vllm_budgetdraft.vllm_integration.compatibility import NEWEST, OLDEST

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        line: of its opening fence.
    """

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def code_blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks of a page, in order, without what indents them."""
    opening: re.Match | None = None
    first, content = 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
        fence = FENCE.match(line)
        if opening is None:
            if fence:
                opening, first, content = fence, number, []
        elif fence and fence[3].strip() == "" and fence[2].startswith(opening[2]):
            words = opening[3].split()
            text = "\n".join(each.removeprefix(opening[1]) for each in content)
            yield Block(page, first, words[0] if words else "", text + "\n")
            opening = None
        else:
            content.append(line)
    assert opening is None, f"{name_of(page)}:{first} is not closed"


BLOCKS = [block for page in PAGES for block in code_blocks(page)]


# Commands.


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
    from vllm_budgetdraft.training.__main__ import with_config

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


# Blocks by language.


def check_bash(block: Block) -> None:
    text = block.text
    if block.language == "console":
        text = "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE))
    for program, *words in commands(text):
        assert program in PROGRAMS, f"unknown command {program!r}"
        try:
            PROGRAMS[program](words)
        except SystemExit:
            pytest.fail(f"{program} does not take {words}")


def check_json(block: Block) -> None:
    content = json.loads(block.text)
    if isinstance(content, dict) and content.get("method") == "budgetdraft":
        check_speculative_config(content)


@cache
def metric_names() -> set[str]:
    """Names that ``/metrics`` may have, of vLLM's and of ours."""
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    sources = [*folder.glob("v1/metrics/*.py"), *folder.glob("v1/spec_decode/*.py")]
    names = set()
    for source in sources:
        text = source.read_text(encoding="utf-8")
        names |= set(re.findall(r'"(vllm:\w+)"', text))
    ours = [
        *statistics.GAUGES,
        *statistics.COUNTERS,
        *statistics.LABELLED_COUNTERS,
    ]
    names |= {f"vllm_budgetdraft:{name}" for name in ours}
    suffixes = ("", "_total", "_sum", "_count", "_bucket")
    return {name + suffix for name in names for suffix in suffixes}


def check_promql(block: Block) -> None:
    for opening, closing in ("()", "[]", "{}"):
        assert block.text.count(opening) == block.text.count(closing)
    found = re.findall(r"\bvllm\w*:\w+", block.text)
    assert found and set(found) <= metric_names(), set(found) - metric_names()


def check_mermaid(block: Block) -> None:
    assert block.text.split()[0] in ("flowchart", "sequenceDiagram", "stateDiagram-v2")


def check_python_block(block: Block) -> None:
    compile(block.text, block.place, "exec")


LANGUAGES: dict[str, Callable[[Block], Any]] = {
    "bash": check_bash,
    "console": check_bash,
    "jinja": lambda block: jinja2.Environment().parse(block.text),
    "json": check_json,
    "mermaid": check_mermaid,
    "promql": check_promql,
    "python": check_python_block,
    "text": lambda block: None,
    "yaml": lambda block: yaml.safe_load(block.text),
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_is_what_it_says_it_is(block):
    assert block.language in LANGUAGES, f"{block.place} is {block.language!r}"
    LANGUAGES[block.language](block)


def needs_engine(block: Block) -> bool:
    imports = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(block.text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    return bool(imports & {"vllm", "openai"})


def runnable_pages() -> list[Path]:
    return [
        page
        for page in PAGES
        if any(
            block.language == "python" and not needs_engine(block)
            for block in BLOCKS
            if block.page == page
        )
    ]


@pytest.mark.parametrize("page", runnable_pages(), ids=name_of)
def test_python_without_an_engine_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "page"}
    for block in code_blocks(page):
        if block.language == "python" and not needs_engine(block):
            exec(compile(block.text, block.place, "exec"), names)


def test_the_policy_of_the_page_keeps_what_it_may(tmp_path, monkeypatch):
    (text,) = (
        block.text
        for block in code_blocks(DOCS / "policies.md")
        if "(EvictionPolicy)" in block.text
    )
    (name,) = re.findall(r"^class (\w+)", text, re.MULTILINE)
    (tmp_path / "policy_of_the_page.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    settings = EvictionSettings(eviction_policy=f"policy_of_the_page:{name}")
    policy = make_policy(settings)
    for num_tokens in (5, 64, 100, 1000):
        states = PromptStates(torch.randn(2, 3, num_tokens, 8))
        check_selection(policy.select(states, 64), states, 64)


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [*(sys.executable, "-m", "mkdocs"), "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "WARNING" not in said, said
    return folder


def text_of(site: Path, page: str) -> str:
    """What a page of the site says, without its markup."""
    source = (site / page / "index.html").read_text(encoding="utf-8")
    return html.unescape(re.sub(r"<[^>]+>", "", source))


def test_the_configuration_page_has_every_setting(site):
    text = text_of(site, "configuration")
    for name, field in BudgetDraftConfig.model_fields.items():
        assert f"\n{name}: " in text and field.description in text, name
    for name in RequestSettings.model_fields:
        assert name in text
    for variable in re.findall(
        r"BUDGETDRAFT_\w+", Path(environment.__file__).read_text()
    ):
        assert variable in text


def test_the_pages_have_what_is_made_of_the_code(site):
    for name in [*statistics.GAUGES, *statistics.COUNTERS]:
        assert f"vllm_budgetdraft:{name}" in text_of(site, "metrics")
    internals = text_of(site, "internals")
    folder = ROOT / "vllm_budgetdraft/vllm_integration/patches"
    for path in folder.glob("*.py"):
        for _, name in re.findall(
            r'wrap_method\(\s*(\w+), "(\w+)"', path.read_text(encoding="utf-8")
        ):
            assert f".{name}" in internals, f"{path.name}: {name}"
    assert "match_temperature" in text_of(site, "training")
    assert "--engines-at-once" in text_of(site, "evaluation")


def test_no_page_repeats_the_settings():
    for page in DOCS.rglob("*.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        for name, field in BudgetDraftConfig.model_fields.items():
            described = field.description in text and len(field.description) > 40
            assert not described, f"{name_of(page)} repeats {name}"


# What pages must not leave out.


def test_every_policy_has_a_section():
    text = (DOCS / "policies.md").read_text(encoding="utf-8")
    for name in POLICIES:
        assert f"\n## `{name}`\n" in text


def test_the_supported_range_is_stated():
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    for page in ("quick-start.md", "limits.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        assert f"{oldest} to {newest}" in " ".join(text.split())


OURS = {name for name, each in vars(errors).items() if isinstance(each, type)}
RAISED = OURS | {"BadRequestError", "RuntimeError", "ValueError"}
LOGGED = {"warning", "error", "exception"}


def messages() -> Iterator[tuple[str, str]]:
    """What users may be told, "..." for what varies; and where from."""
    for path in sorted((ROOT / "vllm_budgetdraft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            told = _told(node)
            message = "..." if told is None else _fixed(told)
            if message.strip(". "):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", message


def _fixed(told: ast.AST) -> str:
    """A message as it is written, but for what is put into it."""
    if isinstance(told, ast.Constant):
        text = re.sub(r"%[-+.\d]*[sdfx]", "...", str(told.value))
    elif isinstance(told, ast.JoinedStr):
        text = "".join(map(_fixed, told.values))
    elif isinstance(told, ast.BinOp):
        text = _fixed(told.left) + _fixed(told.right)
    else:
        text = "..."
    return re.sub(r"\s+", " ", text)


def _told(node: ast.AST) -> ast.AST | None:
    """The message that is raised or logged here."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        call = node.exc
        is_told = isinstance(call.func, ast.Name) and call.func.id in RAISED
        return call.args[0] if is_told and call.args else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = ast.unparse(node.func.value)
        if "ogger" in owner and node.func.attr in LOGGED and node.args:
            return node.args[0]
    return None


@pytest.mark.parametrize(("place", "message"), [*messages()])
def test_every_message_is_explained(place, message):
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert f"`{message.strip()}`" in " ".join(text.split()), place


def test_messages_are_found_in_the_code():
    found = dict(messages())
    assert len(found) > 60
    assert "... is even; use ... or ..." in found.values()
    assert any("generation goes on" in message for message in found.values())
