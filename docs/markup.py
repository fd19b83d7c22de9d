"""Markdown of what is generated."""

import inspect
import re
from collections.abc import Iterable
from typing import Any


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )


def code(value: Any) -> str:
    return f"`{value}`"


def prose(docstring: str | None) -> str:
    """A docstring's paragraphs, with code as Markdown has it."""
    return re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(docstring or ""))


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]
