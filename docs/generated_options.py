"""Generators of the options of commands."""

import dataclasses
import importlib
import os
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any

from markup import code, prose, sentence, table

from vllm_budgetdraft.comparison.evaluate import PROTOCOLS
from vllm_budgetdraft.training import arguments

ROOT = Path(__file__).resolve().parents[1]


def training_options() -> str:
    """Ours; those of the view are settings, and documented as such."""
    classes = [
        each
        for each in vars(arguments).values()
        if isinstance(each, type)
        and dataclasses.is_dataclass(each)
        and each is not arguments.ViewSettingsArguments
    ]
    parts = []
    for each in classes:
        title = each.__name__.removesuffix("Arguments")
        rows = [_training_option(field) for field in dataclasses.fields(each)]
        head = ("Option", "Default", "Meaning")
        parts.append(f"### {title}\n\n{prose(each.__doc__)}\n\n{table(head, rows)}")
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
            meaning = sentence(meaning) + "."
        if action.choices:
            choices = ", ".join(code(each) for each in action.choices)
            meaning = f"{meaning} One of {choices}.".strip()
        rows.append([names, default, meaning])
    return table(("Option", "Default", "Meaning"), rows)


def protocols() -> str:
    """What ``--protocol`` stands for."""
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
