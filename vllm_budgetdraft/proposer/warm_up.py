"""Trying everything at start-up, so that no request waits for what is made late."""

from collections.abc import Iterable

import torch
from torch import Tensor

from budgetdraft_kernels import reference
from vllm_budgetdraft.proposer.draft_length import ladder
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer


def warm_up(proposer: DraftProposer) -> None:
    """Runs every operation once, on slots that must be idle.

    Kernels are compiled for sizes: it launches them at every batch size and width for
    which they may be others. A pass over prompts is as large as can be, for vLLM to see
    what memory that takes.
    """
    cache, pass_tokens = proposer.cache, proposer.plan.pass_tokens
    length = pass_tokens
    if proposer.config.eviction_policy != "keep_all":  # else there is nothing to choose
        length = max(length, proposer.kv_budget + FIRST_WIDTH + 1)
    length = min(length, proposer.max_model_len)
    length = max(length, FIRST_WIDTH)  # no context that drafts is shorter
    tokens = torch.zeros(length, dtype=torch.int64, device=proposer.device)
    slots = []
    for slot in range(min(-(-pass_tokens // length), cache.num_slots)):
        if proposer.has_room():
            proposer.start_reading(slot, length - FIRST_WIDTH)
            slots.append(slot)

    def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
        return torch.cat([tokens[piece.start : piece.stop] for _, piece in pieces])

    proposer.reader.read(slots, tokens_of, len(slots) * length)
    _try_all(proposer, torch.zeros_like(tokens[:1]), length, [1])
    proposer.release_all()
    if proposer.operations is not reference:
        widths = range(1, proposer.max_append + 1)
        for size in ladder(cache.num_slots):
            spare = tokens.new_full((size,), cache.spare_slot)
            _try_all(proposer, spare, FIRST_WIDTH, widths)
    cache.forget_evictions()


def _try_all(
    proposer: DraftProposer, slots: Tensor, length: int, widths: Iterable[int]
) -> None:
    """Appends and drafts where slots have read all but the end of a context."""
    zeros, ends = torch.zeros_like(slots)[:, None], torch.full_like(slots, length)
    for width in widths:
        proposer.append(
            slots, zeros.expand(-1, width), ends - FIRST_WIDTH, validate=True
        )
    temperatures: list[Tensor | None] = [None]
    if proposer.config.draft_sample_method == "probabilistic":
        temperatures.append(torch.ones(len(slots), device=proposer.device))
    for each in temperatures:
        proposer.draft(
            slots, zeros.expand(-1, FIRST_WIDTH), ends, None, each, validate=True
        )
