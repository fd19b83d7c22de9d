"""What MkDocs pages do not say by themselves: tables of the code, files beside docs/.

A line ``<!-- name arguments -->`` of a page becomes what ``GENERATORS[name]`` returns
for the arguments. Links that lead out of docs/ work in the repository as they are; for
the site, the files they name are copied beside the pages.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import posixpath
import re
import sys
import types
import typing
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
#: The package of the pages' own checkout, wherever else one is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

MARKER = re.compile(r"^<!-- *(\S+)(?: +(.*?))? *-->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()#\s]+)((?:#[^()\s]*)?)\)")
#: What a link to a folder shows, the first of them that is there.
FRONT_PAGES = ("README.md", "report.html")
#: What the site shows of the repository. Of a link to anything else the text is left.
READABLE = {".csv", ".html", ".json", ".jsonl", ".md", ".png", ".svg"}
#: Files of the repository, and pages that include them.
INCLUDED = {
    ROOT / "CHANGELOG.md": DOCS / "changelog.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
}

#: Settings as the configuration page groups them.
GROUPS = {
    "The drafter": ["model", "drafter_type", "draft_dtype", "attention_backend"],
    "Draft length": [
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "draft_confidence_threshold",
        "adaptive_draft_length",
    ],
    "Sampling": ["draft_sample_method"],
    "Draft cache": ["kv_budget", "recent_window", "page_size", "pool_memory_gib"],
    "Reading prompts": ["draft_prefill", "draft_prefill_chunk", "position_mode"],
    "Eviction": [
        "eviction_policy",
        "sink_tokens",
        "local_tokens",
        "chunk_size",
        "chunk_score",
        "observation_tokens",
        "pooling_size",
    ],
}


# What MkDocs calls.


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ that pages link to."""
    waiting = [DOCS / page.src_uri for page in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        for path in _linked(waiting.pop()):
            if path in seen or path.is_relative_to(DOCS):
                continue
            seen.add(path)
            files.append(
                File(
                    path.relative_to(ROOT).as_posix(),
                    str(ROOT),
                    config.site_dir,
                    config.use_directory_urls,
                    inclusion=InclusionLevel.NOT_IN_NAV,
                )
            )
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    source = Path(page.file.src_dir or DOCS, page.file.src_uri)
    markdown = relink(markdown, source, page.file.src_uri)
    if not source.is_relative_to(DOCS):
        return markdown
    return MARKER.sub(lambda match: _generated(match, page), markdown)


def _generated(marker: re.Match, page: Page) -> str:
    name, arguments = marker[1], (marker[2] or "").split()
    if name == "include":
        source = ROOT / arguments[0]
        if source not in INCLUDED:
            raise PluginError(f"{arguments[0]} is not in INCLUDED of docs/hooks.py")
        return relink(source.read_text("utf-8"), source, page.file.src_uri)
    if name not in GENERATORS:
        raise PluginError(f"{page.file.src_uri}: nothing generates {marker[0]}")
    return GENERATORS[name](*arguments)


# Links.


def relink(markdown: str, source: Path, uri: str) -> str:
    """Links of a file of the repository, as a page at ``uri`` of the site has them."""

    def link(match: re.Match) -> str:
        image, text, target, anchor = match.groups()
        path = _named(source, target)
        if path is None:
            return match[0]
        if (shown := _shown(path)) is None:
            return text
        base = DOCS if shown.is_relative_to(DOCS) else ROOT
        there = shown.relative_to(base).as_posix()
        there = posixpath.relpath(there, posixpath.dirname(uri) or ".")
        return f"{image}[{text}]({there}{anchor})"

    return LINK.sub(link, markdown)


def _named(source: Path, link: str) -> Path | None:
    """What a link names; None if that is not in the repository."""
    if ":" in link or link.startswith("/"):
        return None
    path = Path(os.path.normpath(source.parent / link))
    return path if path.exists() and path.is_relative_to(ROOT) else None


def _shown(path: Path) -> Path | None:
    """What the site shows of a file or folder; None for source code."""
    if path.is_dir():
        fronts = [path / name for name in FRONT_PAGES if (path / name).is_file()]
        path = fronts[0] if fronts else path
    path = INCLUDED.get(path, path)
    if path.suffix not in READABLE or path == ROOT / "README.md":
        return None
    return path


def _linked(page: Path) -> Iterator[Path]:
    """What the site shows of what a page links to."""
    included = {there: here for here, there in INCLUDED.items()}
    for source in filter(None, (page, included.get(page))):
        for match in LINK.finditer(source.read_text(encoding="utf-8")):
            path = _named(source, match[3])
            if path and (shown := _shown(path)):
                yield shown


# Markdown.


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )


def code(value: Any) -> str:
    return f"`{value}`"


def _prose(docstring: str | None) -> str:
    """A docstring's paragraphs, with code as Markdown has it."""
    return re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(docstring or ""))


# Settings.

NAMES = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
COMPARISONS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def kind(annotation: Any) -> str:
    """A type, as one writes it in JSON."""
    if annotation in NAMES:
        return NAMES[annotation]
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(code(each) for each in parts)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(kind(each) for each in parts)
    if origin is tuple:
        return f"[{', '.join(kind(each) for each in parts)}]"
    if origin is list:
        return f"list of {kind(parts[0])}"
    raise PluginError(f"no name for the type {annotation}")


def settings() -> str:
    """Every key of a speculative config, in groups."""
    from vllm_budgetdraft.config import BudgetDraftConfig

    fields = BudgetDraftConfig.model_fields
    grouped = [name for names in GROUPS.values() for name in names]
    if sorted(grouped) != sorted(fields):
        difference = sorted(set(grouped) ^ set(fields))
        raise PluginError(f"GROUPS of docs/hooks.py and the settings: {difference}")
    parts = []
    for title, names in GROUPS.items():
        parts += [f"### {title}", *(_setting(name, fields[name]) for name in names)]
    return "\n\n".join(parts)


def _setting(name: str, field: Any) -> str:
    limits = [
        f"{sign} {getattr(each, key)}"
        for each in field.metadata
        for key, sign in COMPARISONS.items()
        if hasattr(each, key)
    ]
    default = "required"
    if not field.is_required():
        default = f"default {code(json.dumps(field.default))}"
    facts = [kind(field.annotation), *limits, default]
    return f"{code(name)}: {', '.join(facts)}\n:   {field.description}"


def request_settings() -> str:
    from vllm_budgetdraft.config import RequestSettings

    meanings = attributes(RequestSettings.__doc__)
    rows = [
        [code(name), kind(field.annotation), meanings[name]]
        for name, field in RequestSettings.model_fields.items()
    ]
    return table(("Key", "Type", "Meaning"), rows)


def attributes(docstring: str | None) -> dict[str, str]:
    """What the section "Attributes" of a docstring says of each."""
    section = inspect.cleandoc(docstring or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE)
    return {name: _sentence(re.sub(r"\s+", " ", _prose(text))) for name, text in found}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def environment_variables() -> str:
    from vllm_budgetdraft import environment

    rows = []
    for function in vars(environment).values():
        doc = getattr(function, "__doc__", None) if callable(function) else None
        if doc and doc.startswith("BUDGETDRAFT_"):
            name, _, meaning = inspect.cleandoc(doc).partition(": ")
            rows.append([code(name), _sentence(re.sub(r"\s+", " ", meaning))])
    return table(("Variable", "Meaning"), rows)


# Options of commands.


def training_options() -> str:
    """Ours; those of the eviction policy are settings, and documented as such."""
    from vllm_budgetdraft.training import arguments

    classes = [
        each
        for each in vars(arguments).values()
        if isinstance(each, type)
        and dataclasses.is_dataclass(each)
        and each is not arguments.EvictionArguments
    ]
    parts = []
    for each in classes:
        title = each.__name__.removesuffix("Arguments")
        rows = [_training_option(field) for field in dataclasses.fields(each)]
        head = ("Option", "Default", "Meaning")
        parts.append(f"### {title}\n\n{_prose(each.__doc__)}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _training_option(field: dataclasses.Field) -> list[str]:
    default: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    shown = "required" if default is dataclasses.MISSING else _default(default)
    meaning = field.metadata["help"]
    if choices := field.metadata.get("choices"):
        meaning += f" One of {', '.join(map(code, choices))}."
    return [code(f"--{field.name}"), shown, meaning]


def command_options(module: str) -> str:
    """Options of a subcommand, whose module has ``add_arguments``."""
    parser = ArgumentParser(add_help=False)
    importlib.import_module(f"vllm_budgetdraft.{module}").add_arguments(parser)
    rows = []
    for action in parser._actions:
        names = ", ".join(map(code, action.option_strings or [action.dest]))
        is_flag = action.nargs == 0
        default = "required" if action.required else _default(action.default)
        default = "" if is_flag else default
        meaning = action.help or ""
        if meaning:
            meaning = _sentence(meaning) + "."
        if action.choices:
            choices = ", ".join(code(each) for each in action.choices)
            meaning = f"{meaning} One of {choices}.".strip()
        rows.append([names, default, meaning])
    return table(("Option", "Default", "Meaning"), rows)


def protocols() -> str:
    """What ``--protocol`` stands for."""
    from vllm_budgetdraft.comparison.evaluate import PROTOCOLS

    names = list(PROTOCOLS)
    rows = [
        [code("--" + option.replace("_", "-"))]
        + [_default(PROTOCOLS[name][option]) for name in names]
        for option in PROTOCOLS[names[0]]
    ]
    return table(["Option", *map(code, names)], rows)


def _default(value: Any) -> str:
    if value is None or value == [] or value == SUPPRESS:
        return ""
    if isinstance(value, str) and value.startswith(("..", "/")):
        path = Path(os.path.normpath(Path.cwd() / value))  # one of the embedded models
        value = path.relative_to(ROOT).as_posix()
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return code(value)


# vLLM.


def metrics() -> str:
    from vllm_budgetdraft.vllm_integration import statistics as ours

    prefix = "vllm_budgetdraft:"
    rows = [[code(prefix + n), "gauge", "", text] for n, text in ours.GAUGES.items()]
    rows += [
        [code(f"{prefix}{name}_total"), "counter", "", text]
        for name, text in ours.COUNTERS.items()
    ]
    rows += [
        [code(f"{prefix}{name}_total"), "counter", code(label), text]
        for name, (label, text) in ours.LABELLED_COUNTERS.items()
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
            doc = _prose(ast.get_docstring(tree))
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
    doc = _prose(ast.get_docstring(patch.function))
    doc = re.sub(r"\b(Symptom|Reason)\b([^:\n]*):", r"**\1\2**:", doc, count=2)
    doc = re.sub(r"\bRemove\b", "**Remove**", doc)
    indented = "\n".join(f"    {line}" if line else "" for line in doc.split("\n"))
    attributes = ", ".join(map(code, patch.attributes))
    return f"{attributes} by `{patch.function.name}`\n:{indented[1:]}"


GENERATORS: dict[str, Callable[..., str]] = {
    "settings": settings,
    "request-settings": request_settings,
    "environment": environment_variables,
    "training-options": training_options,
    "command-options": command_options,
    "protocols": protocols,
    "metrics": metrics,
    "patches": patches,
}
