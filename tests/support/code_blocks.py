"""Checks of the documentation's code blocks, by language."""

import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from tests.support.command_lines import PROGRAMS, check_speculative_config, commands
from tests.support.pages import Block
from vllm_budgetdraft.vllm_integration.metrics import statistics


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
        *statistics.HISTOGRAMS,
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
