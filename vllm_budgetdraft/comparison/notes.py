"""What a reader of a comparison must know to judge its numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_budgetdraft.comparison.methods import Method, has_suffix

#: Whose engines have none of our patches.
PEERS = {"ngram", "suffix", "draft_model"}


@dataclass(frozen=True)
class Circumstances:
    """Of a run.

    Attributes:
        chat_template: whose it is, a file or a model; None if none is used.
        cost_padded: what a target's configuration says of how it was padded, if it was.
    """

    methods: list[Method]
    tasks: list[str]
    temperatures: list[float]
    chat_template: str | None
    cost_padded: dict[str, Any] | None
    enforce_eager: bool


def notes(run: Circumstances) -> Iterator[str]:
    """Sentences."""
    if padded := run.cost_padded:
        yield (
            f"The target is {padded['from']} padded to the cost of {padded['to']} "
            "parameters: its texts and acceptance are those of the small model, its "
            "time and memory those of the large one."
        )
    if run.chat_template:
        yield (
            f"Prompts are in the chat template of {run.chat_template}, and outputs end "
            "where answers do."
        )
    else:
        yield (
            "Prompts are plain text, in no chat template, and outputs go on beyond an "
            "end of text."
        )
    kinds = {method.kind for method in run.methods}
    on_cpu = not torch.cuda.is_available()
    if not has_suffix():
        yield "vLLM's suffix decoding is not installed, and was not measured."
    if "ngram" not in kinds:
        yield (
            "No n-gram drafter was measured: how much repetitions alone would bring is "
            "not known."
        )
    if "qmsum" not in run.tasks:
        yield "No meetings (QMSum) were given."
    if on_cpu:
        yield "Measured on a CPU, where vLLM schedules synchronously, plain or not."
    if run.enforce_eager:
        yield (
            "All engines have enforce_eager: vLLM compiles nothing, which slows plain "
            "vLLM most."
        )
    if drawn := [t for t in run.temperatures if t]:
        yield from _of_temperatures(run.methods, drawn, on_cpu)


def _of_temperatures(
    methods: list[Method], drawn: list[float], on_cpu: bool
) -> Iterator[str]:
    at = " and ".join(f"{t:g}" for t in drawn)
    yield (
        f"At temperature {at} requests have no seed. Outputs are equal in distribution "
        "only, and are not compared."
    )
    picked: dict[str, list[str]] = {}
    for method in methods:
        if how := method.drafts_at(drawn[0]):
            picked.setdefault(how, []).append(method.kind)
    for how, kinds in sorted(picked.items()):
        names = " and ".join(dict.fromkeys(kinds))
        if how == "drawn":
            yield f"Drafts of {names} are then drawn from the drafter's distribution."
        else:
            yield f"Drafts of {names} are greedy even then, by vLLM's default."
    peers = sorted({method.kind for method in methods} & PEERS)
    if peers and on_cpu:
        yield (
            "On a CPU, vLLM's own sampler gives another distribution at a temperature "
            f"under speculation: {', '.join(peers)} are measured so, for only "
            "budgetdraft's engines have the patch."
        )
