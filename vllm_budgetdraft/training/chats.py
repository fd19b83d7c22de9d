"""Conversations that others had, for training: what their assistants said."""

from collections import Counter
from functools import partial
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from vllm_budgetdraft.conversations import (
    MalformedConversationError,
    answers,
    messages_of,
    reasons_of,
    set_chat_template,
)
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.sources import open_source

logger = logging.get_logger(__name__)


def read_conversations(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> Dataset:
    """``prompt`` and ``continuation`` of every turn of an assistant, in the template.

    Rows that have none are left out, and the log says how many and why.

    Raises:
        ConfigurationError: see ``open_source`` and ``set_chat_template``; or no row has
            an answer.
    """
    set_chat_template(tokenizer, chat_template)
    found = []
    for source in sources:
        rows = open_source(source)
        columns = rows.column_names
        encode = partial(_encode, tokenizer=tokenizer)
        encoded = rows.map(encode, remove_columns=columns)
        left_out = Counter(why for why in encoded["left_out"] if why)
        reasons = reasons_of(left_out)
        answered = encoded.map(
            _flatten, batched=True, remove_columns=encoded.column_names
        )
        if not len(answered):
            raise ConfigurationError(
                f"{source!r} has {len(rows)} rows and no answer of an assistant "
                f"(left out: {reasons}); give rows with messages, conversations or "
                "turns, or have the target answer: budgetdraft generate --conversations"
            )
        if left_out:
            logger.warning("rows of %s that are left out: %s", source, reasons)
        found.append(answered)
    return concatenate_datasets(found)


def _encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    pairs, left_out = [], ""
    try:
        pairs = answers(tokenizer, messages_of(row))
        left_out = "" if pairs else "without an answer"
    except MalformedConversationError as error:
        left_out = f"malformed ({error})"
    prompts, continuations = zip(*pairs, strict=True) if pairs else ((), ())
    return {
        "prompt": list(prompts),
        "continuation": list(continuations),
        "left_out": left_out,
    }


def _flatten(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        name: [tokens for turns in batch[name] for tokens in turns]
        for name in ("prompt", "continuation")
    }
