"""Which tokens of a vocabulary a target writes most."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vllm_budgetdraft.errors import ConfigurationError


def count_tokens(rows: Dataset, column: str, vocab_size: int) -> Tensor:
    """How often each token occurs in lists of token ids: [vocab_size] int64."""
    # In Arrow's own memory: books as Python lists would take tens of gigabytes.
    lists = rows.flatten_indices().data.column(column)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in lists.chunks:
        counts += np.bincount(chunk.flatten().to_numpy(), minlength=vocab_size)
    return torch.from_numpy(counts)


def kept_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of control tokens, and of numbers, which texts have in any order.

    Control tokens end texts and turns, and are what templates are made of.
    """
    added = tokenizer.added_tokens_decoder.items()
    control = {id for id, token in added if token.special}
    vocabulary = tokenizer.get_vocab()
    pieces = tokenizer.batch_decode([[id] for id in vocabulary.values()])
    named = zip(vocabulary.values(), pieces, strict=True)
    numbers = {id for id, piece in named if piece.isascii() and piece.isdigit()}
    return sorted(control | set(tokenizer.all_special_ids) | numbers)


def likeliest_tokens(
    counts: Tensor, kept: Sequence[int], size: int | None = None
) -> Tensor:
    """Token ids [size] int64, the likeliest first, but for those kept in any case.

    Tokens that occur as often come by their ids: a tokenizer that merges pairs has made
    those of lower ids of commoner pairs.

    Args:
        counts: [vocab_size] int64.
        kept: ids that come first.
        size: all of them if None.

    Raises:
        ConfigurationError: there are not as many tokens, or more are kept.
    """
    if size is not None and not len(kept) < size <= len(counts):
        raise ConfigurationError(
            f"a draft vocabulary of {size} tokens: there are {len(counts)}, and "
            f"{len(kept)} control tokens and numbers are kept in any case; choose a "
            "size above these, and at most as many as there are"
        )
    counts = counts.clone()
    counts[list(kept)] += counts.sum() + 1
    return counts.sort(descending=True, stable=True).indices[:size]
