"""Which tokens a drafter drafts, how much of a text these are, and what that saves."""

import statistics
import time
from typing import Any

import torch

from vllm_budgetdraft.attention.backend import default_device
from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.drafter.draft_vocabulary import FILE, read_draft_vocabulary
from vllm_budgetdraft.drafter.folder import read_config
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.proposer.building import build_proposer
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.memory import resolve_dtype

#: Drafts whose median time is told, and tokens that were read before.
NUM_TIMED, CONTEXT_TOKENS = 15, 256


def describe(config: SettledConfig, vocab_size: int) -> str:
    """How many tokens are drafted, as far as files say.

    Args:
        vocab_size: the target's.

    Raises:
        UnsupportedDrafterError: see ``read_draft_vocabulary``.
    """
    drafter = read_config(config.model)
    if config.drafter_type == "eagle3":
        return f"{drafter.draft_vocab_size} of {vocab_size} tokens (d2t)"
    ids = read_draft_vocabulary(
        config.model, drafter, config.draft_vocabulary_size, vocab_size
    )
    if ids is not None:
        return f"{len(ids)} of {vocab_size} tokens ({FILE})"
    with torch.device("meta"):
        model = Drafter(drafter, 1)
    head = model.head.numel()
    layers = sum(p.numel() for p in model.layers.parameters())
    count, share = min(vocab_size, drafter.vocab_size), head / (head + layers)
    return (
        f"all {count} tokens: the output matrix is {share:.0%} "
        "of what a draft multiplies with, and budgetdraft vocabulary makes it smaller"
    )


def measure(config: SettledConfig, written: list[list[int]], target: Any) -> str | None:
    """The share of a text that may be drafted, and the time of drafts with all tokens.

    On a GPU drafts are timed without CUDA graphs: they take longer than in serving.

    Args:
        written: token ids, by the target.
        target: vLLM's ModelConfig.

    Returns:
        None for a drafter of all tokens.
    """
    vocab_size = target.get_vocab_size()
    ids = read_draft_vocabulary(
        config.model,
        read_drafter_config(config.model),
        config.draft_vocabulary_size,
        vocab_size,
    )
    if ids is None:
        return None
    tokens = torch.tensor([token for each in written for token in each])
    covered = int(torch.isin(tokens, ids).sum())
    device = default_device()
    dtype = resolve_dtype(config, device.type, target.dtype)
    proposers = [
        build_proposer(
            config.model_copy(update={"draft_vocabulary_size": size}),
            num_slots=1,
            max_model_len=2 * CONTEXT_TOKENS,
            dtype=dtype,
            device=device,
            vocab_size=vocab_size,
        )
        for size in (len(ids), 0)
    ]
    fewer, every = _draft_times(proposers, tokens[:1].to(device))
    return (
        f"{covered / len(tokens):.1%} of the {len(tokens)} tokens that the target "
        f"wrote may be drafted; {config.num_speculative_tokens} drafts take "
        f"{1e3 * fewer:.1f} ms, and with all {vocab_size} tokens {1e3 * every:.1f} ms"
    )


def _draft_times(proposers: list[DraftProposer], token: torch.Tensor) -> list[float]:
    """Median seconds of a draft after a context of one token many times, by turns."""
    slots = torch.zeros_like(token)
    ends = slots + CONTEXT_TOKENS
    for proposer in proposers:
        proposer.start_request(0)
        proposer.ingest(0, token.expand(CONTEXT_TOKENS - FIRST_WIDTH))
    times: list[list[float]] = [[] for _ in proposers]
    for _ in range(NUM_TIMED):
        for proposer, taken in zip(proposers, times, strict=True):
            begun = time.perf_counter()
            proposer.draft(slots, token.expand(1, FIRST_WIDTH), ends).tokens.tolist()
            taken.append(time.perf_counter() - begun)
    return [statistics.median(each) for each in times]
