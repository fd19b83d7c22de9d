"""A target and a drafter with 8 tokens: engines, jobs, and what must come of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.distributions import joint, probabilities
from tests.support.engines import Job

NUM_SAMPLES = 20_000
#: Enough to tell apart what is not close.
FEW_SAMPLES = 2_000
NUM_DRAFTS = 3
#: The first token comes from the prompt; those after it are drafted.
NUM_TOKENS = 3
LETTERS = "abcdefg"
PROMPT = [2, 1, 5]
LONG_PROMPT = PROMPT * 8

SIZES = {
    "vocab_size": len(LETTERS) + 1,
    "eos_token_id": len(LETTERS),
    "bos_token_id": None,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def engine_args(target: Path, drafter: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model": str(target),
        "max_model_len": 64,
        "max_num_seqs": 1000,
        "enable_prefix_caching": False,
        "speculative_config": {
            "method": "budgetdraft",
            "adaptive_draft_length": False,
            "model": str(drafter),
            "num_speculative_tokens": NUM_DRAFTS,
            "kv_budget": 16,
            "recent_window": 16,
            "page_size": 4,
            **settings,
        },
    }


def job(num: int = NUM_SAMPLES, **sampling: Any) -> Job:
    return Job([PROMPT] * num, {"max_tokens": NUM_TOKENS, **sampling})


def distribution(logits: list[Tensor], **settings: float) -> Tensor:
    return joint([probabilities(each, **settings) for each in logits])


def likeliest(logits: list[Tensor]) -> list[int]:
    tokens: list[int] = []
    for each in logits:
        tokens.append(int(each[tuple(tokens)].argmax()))
    return tokens


def acceptance(target: list[Tensor], agreed: list[Tensor]) -> float:
    """Share of first draft tokens that are accepted, where outputs have three tokens.

    Drafts begin after the first one and, if that draft fails, after the second.

    Args:
        target: probabilities of the next token.
        agreed: what of them is accepted.
    """
    second = target[0][:, None] * (target[1] - agreed[1])
    accepted = joint([target[0], agreed[1]]).sum() + joint([second, agreed[2]]).sum()
    return float(accepted / (1 + second.sum()))


def expected_acceptance(target: list[Tensor], drafter: list[Tensor]) -> float:
    """``acceptance`` of drafts that are drawn, by the logits of both."""
    pairs = zip(target, drafter, strict=True)
    pairs = [(probabilities(p), probabilities(q)) for p, q in pairs]
    return acceptance([p for p, _ in pairs], [torch.minimum(*each) for each in pairs])
