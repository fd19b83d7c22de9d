"""A drafter of either kind, by what its folder holds: a decoder, or an EAGLE-3 head."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.drafter.draft_vocabulary import read_draft_vocabulary
from vllm_budgetdraft.drafter.feature_checkpoint import (
    is_feature_drafter,
    load_feature_drafter,
    read_feature_config,
)
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.errors import UnsupportedDrafterError


def read_config(folder: str | Path) -> PretrainedConfig:
    """See ``read_drafter_config`` and ``read_feature_config``."""
    if is_feature_drafter(folder):
        return read_feature_config(folder)
    return read_drafter_config(folder)


def load_for_drafting(
    folder: str | Path,
    *,
    draft_vocabulary_size: int | None,
    max_positions: int,
    dtype: torch.dtype,
    device: torch.device,
    vocab_size: int | None,
    embedding: Tensor | None,
) -> Drafter:
    """Loads a drafter whose output matrix has the rows of what it drafts alone.

    Args:
        draft_vocabulary_size: see ``read_draft_vocabulary``.
        vocab_size: the target's; the drafter's own if None.
        embedding: see ``load_feature_drafter``.

    Raises:
        UnsupportedDrafterError: see ``load_drafter``, ``load_feature_drafter`` and
            ``read_draft_vocabulary``; or a head is to draft fewer tokens than it has.
    """
    where: dict[str, Any] = {
        "max_positions": max_positions,
        "dtype": dtype,
        "device": device,
    }
    if is_feature_drafter(folder):
        if draft_vocabulary_size:
            raise UnsupportedDrafterError(
                f"draft_vocabulary_size={draft_vocabulary_size}, but {folder} is an "
                "EAGLE-3 head, which has logits of the tokens that it drafts alone; "
                "leave the setting out"
            )
        return load_feature_drafter(folder, embedding=embedding, **where)
    config = read_drafter_config(folder)
    ids = read_draft_vocabulary(folder, config, draft_vocabulary_size, vocab_size)
    return load_drafter(folder, vocab_size=vocab_size, draft_ids=ids, **where)
