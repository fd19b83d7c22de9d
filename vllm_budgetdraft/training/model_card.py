"""The card of a trained drafter: what it learnt from, how, and how it does."""

import statistics
from typing import Any

from transformers import TrainerState

from vllm_budgetdraft.drafter.draft_vocabulary import FILE
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.evaluation.acceptance import case_name
from vllm_budgetdraft.flexdraft.modeling import FlexDraft
from vllm_budgetdraft.training.held_out import CHAT

CARD = """\
---
library_name: transformers
tags: [speculative-decoding, vllm, vllm-budgetdraft]
---
# A drafter for {target}

{about}

```
vllm serve {target} --speculative-config \\
  '{{"method": "budgetdraft", "model": "THIS_FOLDER",
     "num_speculative_tokens": 8, "kv_budget": {budget}}}'
```

**Data.** {data}

**Training.** {steps} steps of {windows} windows: prefixes of {prefix} tokens,
continuations of {continuation}. Objective `{objective}`, position weights
`{position_weights}`; full view{sparse}. `eviction_policy` {policy}, `position_mode`
{position_mode}, `draft_prefill` {draft_prefill}. Learning rate {rate:g}, seed {seed}.
`run.json` has every option, `train_command.txt` the command.

**Acceptance.** {acceptance}
"""

DECODER = """\
A {kind} of {millions:.2f} M parameters ({layers} layers, width {width}), for
speculative decoding with vllm-budgetdraft. It loads as a plain `transformers` model,
and as vLLM's `draft_model`, too."""
FLEXDRAFT = """\
FlexDraft of {millions:.2f} M parameters, for speculative decoding with
vllm-budgetdraft: attention projections for mask tokens in the target's last {layers}
layers, and a calibration of rank {rank}. It works with no other target."""

HEAD = """\
An EAGLE-3 head of {millions:.2f} M parameters ({layers} layers, width {width}), for
speculative decoding with vllm-budgetdraft. It reads the target's states after {states}
layers, and uses its embeddings: it works with no other target. vLLM's own `eagle3`
loads it, too. It learnt drafts of {steps} tokens, each with {decay:g} of the weight of
the one before."""

DRAFTED = """

It drafts {drafted:,} of the {all:,} tokens of the vocabulary: {where} names them.
Of the others it has learnt nothing."""


def model_card(
    drafter: Drafter | FlexDraft,
    target: str,
    options: dict[str, Any],
    state: TrainerState,
    num_drafted: int | None = None,
) -> str:
    """Markdown.

    Args:
        options: of the run, by name.
        state: of the trainer, with what was measured.
        num_drafted: tokens of the draft vocabulary; None if all tokens are drafted.
    """
    sources = [
        f"{kind}: {', '.join(options[key])}"
        for key, kind in (
            ("texts", "texts"),
            ("conversations", "conversations"),
            ("continuations", "the target's own"),
        )
        if options[key]
    ]
    sparse = ""
    if options["sparse_weight"] and min(options["budgets"]) < max(
        options["prefix_tokens"]
    ):
        budgets = ", ".join(map(str, options["budgets"]))
        sparse = f" and {options['sparse_weight']:g} of sparse views ({budgets} tokens)"
    return CARD.format(
        target=target,
        about=_about(drafter, options) + _drafted(drafter, num_drafted, state),
        budget=options["budgets"][-1],
        data="; ".join(sources),
        steps=state.global_step,
        windows=options["windows_per_step"],
        prefix=", ".join(map(str, options["prefix_tokens"])),
        continuation=options["continuation_tokens"],
        objective=options["objective"],
        position_weights=options["position_weights"],
        sparse=sparse,
        policy=options["eviction_policy"],
        position_mode=options["position_mode"],
        draft_prefill=options["draft_prefill"],
        rate=options["learning_rate"],
        seed=options["seed"],
        acceptance=_acceptance(options, state),
    )


def _about(drafter: Drafter | FlexDraft, options: dict[str, Any]) -> str:
    millions = sum(p.numel() for p in drafter.parameters()) / 1e6
    if isinstance(drafter, FeatureDrafter):
        return HEAD.format(
            millions=millions - drafter.embedding.numel() / 1e6,
            layers=drafter.num_layers,
            width=drafter.config.hidden_size,
            states=", ".join(map(str, drafter.aux_layers or ())),
            steps=options["ttt_steps"],
            decay=options["ttt_decay"],
        )
    if isinstance(drafter, FlexDraft):
        return FLEXDRAFT.format(
            millions=millions,
            layers=drafter.num_layers,
            rank=drafter.calibration_rank,
        )
    return DECODER.format(
        kind=drafter.config.architectures[0],
        millions=millions,
        layers=drafter.config.num_hidden_layers,
        width=drafter.config.hidden_size,
    )


def _drafted(
    drafter: Drafter | FlexDraft, num_drafted: int | None, state: TrainerState
) -> str:
    """What a draft vocabulary is, and how much of the target's choices it had."""
    if num_drafted is None:
        return ""
    is_head = isinstance(drafter, FeatureDrafter)
    text = DRAFTED.format(
        drafted=num_drafted,
        all=drafter.config.vocab_size,
        where="`d2t` of its weights" if is_head else f"`{FILE}`",
    )
    steps = [entry for entry in state.log_history if "loss" in entry]
    means = {
        name: statistics.fmean(seen)
        for name in ("label_coverage", "coverage")
        if (seen := [entry[name] for entry in steps if name in entry])
    }
    if means:
        text += f"\nIn training these were {means['label_coverage']:.1%} of the tokens "
        text += "that the target chose"
        if "coverage" in means:
            text += f", and {means['coverage']:.1%} of its probability"
        text += "."
    return text


def _acceptance(options: dict[str, Any], state: TrainerState) -> str:
    """A table of the checkpoint that was kept."""
    measured = [e for e in state.log_history if "eval_acceptance_length" in e]
    if not measured:
        return (
            "Not measured: neither held-out conversations (`eval_conversations`) nor "
            "texts (`eval_texts`) were given."
        )
    best = max(measured, key=lambda entry: entry["eval_acceptance_length"])
    budgets = sorted(options["eval_budgets"])
    prompts: list[int | str] = options["eval_contexts"] if options["eval_texts"] else []
    if options["eval_conversations"]:
        prompts = [*prompts, CHAT]
    lines = [
        f"Acceptance length (bonus token included) at {options['eval_draft_tokens']} "
        f"draft tokens, {options['eval_prompts']} held-out prompts of each kind "
        f"and source, {options['eval_new_tokens']} new tokens at most, step "
        f"{best['step']}:",
        "",
        "| temperature | prompt | " + " | ".join(f"budget {b}" for b in budgets) + " |",
        "|---" * (2 + len(budgets)) + "|",
    ]
    for temperature in options["eval_temperatures"]:
        for each in prompts:
            names = [f"eval_{case_name(each, b, temperature)}" for b in budgets]
            cells = " | ".join(f"{best[name]:.2f}" for name in names)
            kind = each if isinstance(each, str) else f"{each} tokens of a text"
            lines.append(f"| {temperature:g} | {kind} | {cells} |")
    return "\n".join(lines)
