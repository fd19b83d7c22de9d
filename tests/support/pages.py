"""The pages of the documentation, and the fenced code blocks in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
