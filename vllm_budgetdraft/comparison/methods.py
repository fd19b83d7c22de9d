"""What a user of vLLM can choose, each as an engine and a setting of its requests."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm_budgetdraft.errors import ConfigurationError

PLAIN = "vllm"
#: As ``--methods`` has them.
KINDS = (
    *(PLAIN, "vllm_sync", "ngram", "suffix"),
    *("draft_model", "eagle3", "budgetdraft"),
)
#: Plain vLLM in the circumstances of budgetdraft: runner V1, which does not overlap
#: scheduling with a step that drafts.
SYNCHRONOUS: dict[str, Any] = {
    "engine_args": {"async_scheduling": False},
    "environment": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
}
#: How drafts are picked at a temperature, if ``draft_sample_method`` is not given: the
#: default of vLLM, and ours.
DRAFT_SAMPLE_METHODS = {
    "draft_model": "greedy",
    "eagle3": "greedy",
    "budgetdraft": "probabilistic",
}


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    Attributes:
        num_speculative_tokens, kv_budget, eviction_policy: 0 or "" where a method has
            none.
        engine_args: of vLLM's ``LLM``, beside what all methods share.
        environment: variables of its engine's process.
    """

    kind: str
    num_speculative_tokens: int = 0
    kv_budget: int = 0
    eviction_policy: str = ""
    engine_args: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.kind, self.eviction_policy]
        parts += [f"budget={self.kv_budget}"] if self.kv_budget else []
        drafts = self.num_speculative_tokens
        parts += [f"k={drafts}"] if drafts else []
        return " ".join(filter(None, parts))

    def drafts_at(self, temperature: float) -> str | None:
        """Whether drafts of requests without a seed are "drawn" or "greedy".

        None where no drafter has a distribution to draw them from.
        """
        default = DRAFT_SAMPLE_METHODS.get(self.kind)
        config = self.engine_args.get("speculative_config", {})
        is_drawn = config.get("draft_sample_method", default) == "probabilistic"
        return default and ("drawn" if is_drawn and temperature else "greedy")


def has_suffix() -> bool:
    """Whether vLLM's suffix decoding has what it needs."""
    return importlib.util.find_spec("arctic_inference") is not None


def default_kinds(drafter: str) -> list[str]:
    """All that can be measured here with a drafter, and are different.

    vLLM has a method for decoders, and another one for EAGLE-3 heads.
    """
    import torch

    from vllm_budgetdraft.drafter.feature_checkpoint import is_feature_drafter

    left_out = {"draft_model" if is_feature_drafter(drafter) else "eagle3"}
    left_out |= set() if has_suffix() else {"suffix"}
    if not torch.cuda.is_available():  # where plain vLLM is synchronous by itself
        left_out.add("vllm_sync")
    return [kind for kind in KINDS if kind not in left_out]


def all_methods(
    kinds: Iterable[str],
    *,
    drafter: str,
    lengths: list[int],
    budgets: list[int],
    policies: list[str],
) -> list[Method]:
    """Plain vLLM first.

    Raises:
        ConfigurationError: an unknown kind, or one that is not installed.
    """
    found = [Method(PLAIN)]
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigurationError(
                f"there is no method {kind!r}; choose from {', '.join(KINDS)}"
            )
        if kind == "suffix" and not has_suffix():
            raise ConfigurationError(
                "vLLM's 'suffix' needs the package arctic-inference; install it, or "
                "leave 'suffix' out of --methods"
            )
        if kind == "vllm_sync":
            found.append(Method(kind, **SYNCHRONOUS))
        elif kind == "budgetdraft":
            found += _budgetdraft(drafter, lengths, budgets, policies)
        elif kind != PLAIN:
            found += [_peer(kind, drafter, length) for length in lengths]
    return found


def _peer(kind: str, drafter: str, length: int) -> Method:
    config: dict[str, Any] = {"method": kind, "num_speculative_tokens": length}
    if kind == "ngram":
        config |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    if kind in ("draft_model", "eagle3"):
        config |= {"model": drafter}
    return Method(kind, length, engine_args={"speculative_config": config})


def _budgetdraft(
    drafter: str, lengths: list[int], budgets: list[int], policies: list[str]
) -> list[Method]:
    """An engine for each: model runner V2 verifies as much of every request."""
    return [
        Method(
            "budgetdraft",
            length,
            budget,
            policy,
            engine_args={
                "speculative_config": {
                    "method": "budgetdraft",
                    "adaptive_draft_length": False,
                    "model": drafter,
                    "num_speculative_tokens": length,
                    "kv_budget": budget,
                    "eviction_policy": policy,
                }
            },
        )
        for policy in policies
        # What keeps everything has one budget only.
        for budget in (budgets[-1:] if policy == "keep_all" else budgets)
        for length in lengths
    ]
