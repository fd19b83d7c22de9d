"""Which tokens of a vocabulary a target writes most."""

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vllm_budgetdraft.errors import ConfigurationError

#: Rows that are counted at once.
BATCH = 10_000


def count_tokens(rows: Dataset, column: str, vocab_size: int) -> Tensor:
    """How often each token occurs in lists of token ids: [vocab_size] int64.

    Raises:
        ConfigurationError: there are ids beyond the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    # In Arrow's own memory: books as Python lists would take tens of gigabytes.
    batches = rows.select_columns([column]).with_format("arrow").iter(BATCH)
    for batch in batches:
        tokens = pc.list_flatten(batch.column(column)).cast(pa.int64())
        found = np.bincount(tokens.to_numpy(), minlength=vocab_size)
        if len(found) > vocab_size:
            raise ConfigurationError(
                f"token id {len(found) - 1} occurs in {column!r}, and the vocabulary "
                f"has ids to {vocab_size - 1}; use a tokenizer, or text, of this target"
            )
        counts += found
    return torch.from_numpy(counts)


def kept_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of control tokens, and of numbers, which texts have in any order.

    Control tokens end texts and turns, and are what templates are made of.
    """
    added = tokenizer.added_tokens_decoder
    control: set[int] = set()
    if isinstance(added, dict):  # not of tokenizers of other libraries
        control = {id for id, token in added.items() if token.special}
    ids = list(tokenizer.get_vocab().values())
    pieces = tokenizer.batch_decode([[id] for id in ids])
    texts = [piece.strip() for piece in pieces]
    is_number = [text.isascii() and text.isdigit() for text in texts]
    numbers = set(itertools.compress(ids, is_number))
    return sorted(control | set(tokenizer.all_special_ids) | numbers)


def likeliest_tokens(
    counts: Tensor, kept: Sequence[int], size: int | None = None
) -> Tensor:
    """Token ids [size] int64: the ones kept in any case, then the likeliest, in order.

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
