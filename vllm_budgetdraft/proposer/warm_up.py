"""Trying everything at start-up, so that no request waits for what is made late."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from budgetdraft_kernels import launch_settings, reference
from vllm_budgetdraft.errors import ConfigurationError, short
from vllm_budgetdraft.proposer.draft_length import ladder
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer


def warm_up(proposer: DraftProposer) -> None:
    """Runs every operation once, on slots that must be idle.

    Kernels are compiled for sizes: it launches them at every batch size and width for
    which they may be others. A pass over prompts is as large as can be, for vLLM to see
    what memory that takes.

    Raises:
        ConfigurationError: the policy cannot choose for two requests at once.
    """
    cache, pass_tokens = proposer.cache, proposer.plan.pass_tokens
    length = pass_tokens
    if proposer.config.eviction_policy != "keep_all":  # else there is nothing to choose
        length = max(length, proposer.kv_budget + FIRST_WIDTH + 1)
    length = min(length, proposer.max_model_len)
    length = max(length, FIRST_WIDTH)  # no context that drafts is shorter
    tokens = torch.zeros(length, dtype=torch.int64, device=proposer.device)
    if observed := min(proposer.policy.observation_tokens, length):
        # The reader keeps the queries of ``observed`` tokens of each context: most
        # queries where contexts have no other tokens.
        _read(proposer, tokens[:observed], -(-pass_tokens // observed))
        proposer.release_all()
    _read(proposer, tokens[:-FIRST_WIDTH], -(-pass_tokens // length))
    _try_all(proposer, torch.zeros_like(tokens[:1]), length, [1])
    proposer.release_all()
    if len(tokens) > proposer.kv_budget:  # else there is nothing to choose
        _choose_for_two(proposer, tokens[: proposer.kv_budget + 1])
    if proposer.operations is not reference:
        # Short prompts are multiplied by kernels of their own, long ones by PyTorch.
        most_rows = launch_settings.settings_of(proposer.device).linear_rows
        _read(proposer, tokens[:most_rows], 1)
        proposer.release_all()
        widths = range(1, proposer.max_append + 1)
        for size in ladder(cache.num_slots):
            spare = tokens.new_full((size,), cache.spare_slot)
            _try_all(proposer, spare, FIRST_WIDTH, widths)
    cache.forget_evictions()


def _read(proposer: DraftProposer, context: Tensor, number: int) -> None:
    """Reads a context [num_tokens] in as many slots from the first, if there are."""
    slots = []
    for slot in range(min(number, proposer.cache.num_slots)):
        if proposer.has_room():
            proposer.start_reading(slot, len(context))
            slots.append(slot)

    def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
        return torch.cat([context[piece.start : piece.stop] for _, piece in pieces])

    features_of = None
    if proposer.reads_features:
        features_of = partial(_zeros, proposer)
    proposer.reader.read(slots, tokens_of, len(slots) * len(context), features_of)


def _zeros(proposer: DraftProposer, pieces: list[tuple[int, range]]) -> Tensor:
    """Features of what is read: [T, hidden_size]."""
    count = sum(len(piece) for _, piece in pieces)
    return proposer.blank_features(count)


def _choose_for_two(proposer: DraftProposer, context: Tensor) -> None:
    """Has the policy choose of two prompts of one length, if a pass holds both.

    Requests of which no pass holds two seldom come to it together.

    Args:
        context: [num_tokens], one more than it may keep.

    Raises:
        ConfigurationError: it fails, or chooses what it must not.
    """
    try:
        _read(proposer, context, 2)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        name = proposer.config.eviction_policy
        raise ConfigurationError(
            f"eviction_policy={name!r:.100} fails where two requests hold as many "
            f"tokens ({type(error).__name__}: {short(error)}); let its select take "
            "[requests, layers, heads, tokens, head_dim] too"
        ) from error
    proposer.release_all()


def _try_all(
    proposer: DraftProposer, slots: Tensor, length: int, widths: Iterable[int]
) -> None:
    """Appends and drafts where slots have read all but the end of a context."""
    zeros, ends = torch.zeros_like(slots)[:, None], torch.full_like(slots, length)
    for width in widths:
        features = None
        if proposer.reads_features:
            features = proposer.blank_features(len(slots) * width)
            features = features.unflatten(0, (len(slots), width))
        proposer.append(
            slots, zeros.expand(-1, width), ends - FIRST_WIDTH, features, validate=True
        )
    draws: list[tuple[Tensor | None, Tensor | None]] = [(None, None)]
    if proposer.config.draft_sample_method == "probabilistic":
        ones = torch.ones(len(slots), device=proposer.device)
        draws += [(ones, None), (ones, torch.ones_like(slots))]
    for each in draws:
        proposer.draft(
            slots,
            zeros.expand(-1, proposer.first_width),
            ends,
            None,
            *each,
            fed=proposer.blank_fed(len(slots)),
            validate=True,
        )
