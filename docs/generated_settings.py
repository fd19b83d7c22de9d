"""Generators of what one can set: in configs, in requests, in the environment."""

import inspect
import json
import re
import types
import typing
from typing import Any

from markup import code, prose, sentence, table
from mkdocs.exceptions import PluginError

from vllm_budgetdraft import environment
from vllm_budgetdraft.config import BudgetDraftConfig, RequestSettings

#: Settings as the configuration page groups them.
GROUPS = {
    "The drafter": [
        *("model", "drafter_type", "draft_vocabulary_size"),
        *("draft_dtype", "attention_backend"),
    ],
    "Draft length": [
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "draft_confidence_threshold",
        "adaptive_draft_length",
    ],
    "FlexDraft": ["flex_decoding"],
    "Sampling": ["draft_sample_method"],
    "Draft cache": [
        *("kv_budget", "recent_window", "page_size"),
        *("pool_memory_gib", "snapshot_memory_gib"),
    ],
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
    fields = BudgetDraftConfig.model_fields
    grouped = [name for names in GROUPS.values() for name in names]
    if sorted(grouped) != sorted(fields):
        difference = sorted(set(grouped) ^ set(fields))
        raise PluginError(
            f"GROUPS of docs/generated_settings.py and the settings: {difference}"
        )
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
    return {name: sentence(re.sub(r"\s+", " ", prose(text))) for name, text in found}


def environment_variables() -> str:
    rows = []
    for function in vars(environment).values():
        doc = getattr(function, "__doc__", None) if callable(function) else None
        if doc and doc.startswith("BUDGETDRAFT_"):
            name, _, meaning = inspect.cleandoc(doc).partition(": ")
            rows.append([code(name), sentence(re.sub(r"\s+", " ", meaning))])
    return table(("Variable", "Meaning"), rows)
