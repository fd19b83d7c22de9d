"""Generators of what we add to vLLM: metrics and patches."""

import ast
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
from vllm_budgetdraft.vllm_integration.patches.table import PATCHES

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
    """Every function of vLLM that is wrapped."""
    rows = []
    for patch in PATCHES:
        module, name = patch.target.split(":")
        versions = "all"
        if patch.oldest is not None:
            versions = "{}.{} and later".format(*patch.oldest)
        rows.append(
            [
                f"{code(name)} of {code(module)}",
                patch.process,
                versions,
                patch.symptom,
                patch.reason,
                f"When {patch.remove}.",
            ]
        )
    titles = "Function", "Process", "vLLM", "Without it", "Why vLLM is so", "It can go"
    return table(titles, rows)


def overrides() -> str:
    """Every method of vLLM's that a subclass of ours has, as its docstring has it."""
    folder = ROOT / "vllm_budgetdraft/vllm_integration"
    paths = sorted(folder.rglob("*.py"))
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    subclasses = set(re.findall(r"specialise\(.*?(\w+)\)", "".join(sources.values())))
    parts = []
    for path, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name in subclasses:
                name = path.relative_to(folder).as_posix()
                doc = prose(ast.get_docstring(node))
                parts += [f"### `{node.name}` in `{name}`", doc]
                parts += [
                    _described(method)
                    for method in node.body
                    if isinstance(method, ast.FunctionDef)
                    and re.search(r"super\(\)|Symptom", ast.unparse(method))
                ]
    return "\n\n".join(parts)


def _described(method: ast.FunctionDef) -> str:
    doc = prose(ast.get_docstring(method))
    doc = re.sub(r"\b(Symptom|Reason):", r"**\1**:", doc)
    doc = re.sub(r"\bRemove\b", "**Remove**", doc)
    indented = "\n".join(f"    {line}" if line else "" for line in doc.split("\n"))
    return f"`{method.name}`\n:{indented[1:]}"
