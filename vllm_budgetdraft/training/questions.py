"""The task ``chat``: first questions of conversations, each as long as it is."""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from vllm_budgetdraft.conversations import (
    MalformedConversationError,
    messages_of,
    prompt_tokens,
    reasons_of,
)
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.sources import open_source

#: Columns of questions that are no conversations: HumanEval's and GSM8K's.
PLAIN_COLUMNS = ("prompt", "question")


def questions(
    tokenizer: Any,
    source: str,
    *,
    longest: int,
    count: int,
    rng: Random,
    uses_template: bool,
    tell: Callable[[str], None],
) -> list[list[int]]:
    """Tokens of ``count`` rows, drawn at random, up to where the model answers.

    What follows a conversation's first question is not asked: it needs an answer to
    stand before it. Rows that cannot be asked are left out, and told of.

    Args:
        source: as ``training.sources.open_source`` takes it, of conversations
            (``messages``, ``conversations`` or ``turns``), or with a column ``prompt``
            or ``question``.
        longest: tokens of a prompt.
        uses_template: or else a question is the plain text.

    Raises:
        ConfigurationError: too few rows can be asked, or the tokenizer has no chat
            template.
    """
    rows = open_source(source)
    left_out: Counter[str] = Counter()
    found: list[list[int]] = []
    for index in rng.sample(range(len(rows)), len(rows)):
        if len(found) == count:
            break
        try:
            messages = first_question(rows[index])
            if not messages:
                left_out["without a question"] += 1
                continue
            if uses_template:
                tokens = prompt_tokens(tokenizer, messages)
            else:
                tokens = tokenizer(messages[-1]["content"])["input_ids"]
        except MalformedConversationError as error:
            left_out[f"malformed ({error})"] += 1
            continue
        if len(tokens) > longest:
            left_out[f"of more than {longest} tokens"] += 1
        else:
            found.append(list(tokens))
    reasons = reasons_of(left_out)
    if len(found) < count:
        raise ConfigurationError(
            f"{source!r} has {len(found)} questions that can be asked, {count} are "
            f"asked for (left out: {reasons or 'none'}); ask for fewer prompts, or "
            "let them be longer"
        )
    if left_out:
        tell(f"chat: rows of {source} that were left out: {reasons}.")
    return found


def first_question(row: dict[str, Any]) -> list[dict[str, str]]:
    """Messages up to the first of a user, with what the system says; or none.

    Raises:
        MalformedConversationError: see ``messages_of``.
    """
    for column in PLAIN_COLUMNS:
        if isinstance(text := row.get(column), str) and text.strip():
            return [{"role": "user", "content": text}]
    messages = messages_of(row)
    for end, message in enumerate(messages, 1):
        if message["role"] == "user" and message["content"].strip():
            return list(messages[:end])
    return []
