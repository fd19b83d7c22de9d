"""A benchmark of several parts, whose results are one file: parts can be done anew."""

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from vllm_budgetdraft import provenance

Part = Callable[[argparse.Namespace], Any]


def run_parts(
    args: argparse.Namespace,
    parts: Mapping[str, Part],
    summary: Callable[[dict[str, Any]], dict[str, float]],
) -> None:
    """Measures ``args.parts`` into ``args.output``, where the other parts stay.

    Args:
        summary: what the parts of a document come to, for its top level.
    """
    document: dict[str, Any] = {"provenance": {}}
    if args.output.is_file():
        document = json.loads(args.output.read_text(encoding="utf-8"))
    for part in args.parts:
        begun = provenance.collect({**vars(args), "output": str(args.output)})
        document[part] = parts[part](args)
        document["provenance"][part] = begun
        document |= summary(document)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1)
        args.output.write_text(text + "\n", encoding="utf-8")
    for name in summary(document):
        print(f"{name}: {document[name]:.3f}")
