"""The troubleshooting page explains every message that a user may be told."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.pages import DOCS, ROOT
from vllm_budgetdraft import errors

OURS = {name for name, each in vars(errors).items() if isinstance(each, type)}
RAISED = OURS | {
    "ArgumentTypeError",
    "BadRequestError",
    "KeyboardInterrupt",
    "RuntimeError",
    "ValueError",
}
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
