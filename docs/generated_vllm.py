"""Generators of what we add to vLLM: metrics and patches."""

import ast
import dataclasses
import re
from pathlib import Path

from markup import code, prose, table

from vllm_budgetdraft.vllm_integration.metrics.statistics import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    LABELLED_COUNTERS,
    PREFIX,
)

ROOT = Path(__file__).resolve().parents[1]


def metrics() -> str:
    rows = [
        [code(f"{PREFIX}{name}"), "gauge", "", text] for name, text in GAUGES.items()
    ]
    rows += [
        [code(f"{PREFIX}{name}_total"), "counter", "", text]
        for name, text in COUNTERS.items()
    ]
    rows += [
        [code(f"{PREFIX}{name}_total"), "counter", code(label), text]
        for name, (label, text) in LABELLED_COUNTERS.items()
    ]
    rows += [
        [code(f"{PREFIX}{name}"), "histogram", "", text]
        for name, (_, text) in HISTOGRAMS.items()
    ]
    return table(("Name", "Kind", "Label", "Meaning"), rows)


def patches() -> str:
    """Every patch of vLLM, by file, as its docstring has it."""
    folder = ROOT / "vllm_budgetdraft/vllm_integration/patches"
    parts = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [_described(each) for each in _patches(tree)]
        if found:
            doc = prose(ast.get_docstring(tree))
            parts += [f"### `patches/{path.name}`", doc, *found]
    return "\n\n".join(parts)


@dataclasses.dataclass
class Patch:
    """A function that wraps attributes of vLLM."""

    function: ast.FunctionDef
    attributes: list[str]


def _patches(tree: ast.Module) -> list[Patch]:
    functions = {
        node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    aliases = {
        node.targets[0].id: ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Attribute)
    }
    found: dict[str, Patch] = {}
    for outer in functions.values():
        for call in ast.walk(outer):
            if not (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)
                and call.func.id == "wrap_method"
            ):
                continue
            owner, name, wrapper = call.args
            shown = aliases.get(ast.unparse(owner), ast.unparse(owner))
            attribute = f"{shown}.{ast.literal_eval(name)}"
            names = [n.id for n in ast.walk(wrapper) if isinstance(n, ast.Name)]
            wrappers = [functions[n] for n in names if n in functions]
            # Where the wrapper says nothing, the function that applies it does.
            said = [each for each in wrappers if ast.get_docstring(each)]
            for function in said or [outer]:
                patch = found.setdefault(function.name, Patch(function, []))
                if attribute not in patch.attributes:
                    patch.attributes.append(attribute)
    return sorted(found.values(), key=lambda patch: patch.function.lineno)


def _described(patch: Patch) -> str:
    doc = prose(ast.get_docstring(patch.function))
    doc = re.sub(r"\b(Symptom|Reason)\b([^:\n]*):", r"**\1\2**:", doc, count=2)
    doc = re.sub(r"\bRemove\b", "**Remove**", doc)
    indented = "\n".join(f"    {line}" if line else "" for line in doc.split("\n"))
    attributes = ", ".join(map(code, patch.attributes))
    return f"{attributes} by `{patch.function.name}`\n:{indented[1:]}"
