"""Conversations in the layouts that data sets have, and in a model's chat template."""

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_budgetdraft.errors import ConfigurationError, short
from vllm_budgetdraft.files import read_text

#: ``role`` and ``content``, as ``apply_chat_template`` takes them.
Message = dict[str, str]

#: OpenAI's, ShareGPT's and MT-bench's.
COLUMNS = ("messages", "conversations", "turns")
ROLES = {
    **{"system": "system", "user": "user", "assistant": "assistant"},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant"},
}
#: Stands for an answer, to see what a template writes around it.
ANSWER = "\u2588answer\u2588"


class MalformedConversationError(ValueError):
    """A row that is no conversation, and why; to be counted, and left out."""


def reasons_of(left_out: Counter[str], most: int = 8) -> str:
    """Says why rows were left out, and how many for each reason."""
    counts = left_out.most_common()
    others = sum(number for _, number in counts[most:])
    reasons = [f"{number} {why}" for why, number in counts[:most]]
    return ", ".join(reasons + [f"{others} for other reasons"] * bool(others))


def messages_of(row: dict[str, Any]) -> list[Message]:
    """The messages of a row; none where it has no such column, or an empty one.

    Strings in place of messages, as MT-bench's ``turns`` are, are the user's.

    Raises:
        MalformedConversationError: no list of messages, or a message of another kind
            than text by the system, the user or the assistant.
    """
    column = next((each for each in COLUMNS if row.get(each)), None)
    if column is None:
        return []
    if not isinstance(row[column], list):
        kind = type(row[column]).__name__
        raise MalformedConversationError(f"a {kind} for a list of messages")
    return [_message(each) for each in row[column]]


def _message(given: Any) -> Message:
    if isinstance(given, str):
        return {"role": "user", "content": given}
    if not isinstance(given, dict):
        raise MalformedConversationError(f"a {type(given).__name__} for a message")
    name = given.get("role") or given.get("from")
    if not isinstance(name, str) or name not in ROLES:
        raise MalformedConversationError(f"a message by {short(repr(name), 60)}")
    content = given.get("content")
    content = given.get("value") if content is None else content
    if isinstance(content, list):  # of parts, as OpenAI has them
        content = "".join(map(_text_of_part, content))
    if not isinstance(content, str):
        raise MalformedConversationError(
            f"a message by {short(repr(name), 60)} without text"
        )
    return {"role": ROLES[name], "content": content}


def _text_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise MalformedConversationError(f"a part of the type {short(repr(kind), 60)}")
    text = part.get("text")
    if not isinstance(text, str):
        raise MalformedConversationError("a part without text")
    return text


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> None:
    """Takes a template in place of the tokenizer's own.

    Args:
        template: a file, or the template itself; the tokenizer's own if None.

    Raises:
        ConfigurationError: there is neither, or it is no template.
    """
    if template is None:
        own = tokenizer.chat_template
        if not own or (isinstance(own, dict) and "default" not in own):
            raise ConfigurationError(
                f"{tokenizer.name_or_path!r} has no chat template, in which a model "
                "is asked; give one with --chat-template, or use a chat model"
            )
        return
    if Path(template).is_file():
        template = read_text(Path(template))
    elif "{" not in template:
        raise ConfigurationError(
            f"--chat-template {template!r} is no file, and no template; give a file of "
            "Jinja, as vLLM's --chat-template"
        )
    tokenizer.chat_template = template


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> list[int]:
    """A conversation up to where the assistant answers.

    Raises:
        MalformedConversationError: the template refuses it, as one without a system's
            turn does where there is one.
        ConfigurationError: the tokenizer has no chat template.
    """
    return encode(tokenizer, render(tokenizer, messages, asks=True))


def answers(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> list[tuple[list[int], list[int]]]:
    """Of each of the assistant's turns: the tokens before it, and its own.

    What comes before is what a model that serves would have read: some templates leave
    out of earlier turns what a model thought. Prompt and answer are tokenized apart,
    as they are there. An answer ends with what ends a turn, if the template says that
    by a special token, be it the tokenizer's end of text or another.

    Raises:
        MalformedConversationError: the template refuses it, or begins an answer with
            what this one does not begin with, a thought most likely.
        ConfigurationError: the tokenizer has no chat template.
    """
    found = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not index:  # or it answers nothing
            continue
        asked = render(tokenizer, messages[:index], asks=True)
        stub = {"role": "assistant", "content": ANSWER}
        whole = render(tokenizer, [*messages[:index], stub], asks=False)
        before, _, after = whole.partition(ANSWER)
        answer = message["content"]
        if before.startswith(asked):
            answer = before[len(asked) :] + answer  # a space, most likely
        elif asked.startswith(before):
            begun = asked[len(before) :]
            if not answer.startswith(begun):
                raise MalformedConversationError(
                    f"the template begins an answer with {begun!r}, and this one not"
                )
            answer = answer[len(begun) :]
        answer += _up_to(_special_tokens(tokenizer), after)
        found.append((encode(tokenizer, asked), encode(tokenizer, answer)))
    return found


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    own = {str(token) for token in added if token.special}
    return sorted(own | set(tokenizer.all_special_tokens), key=len, reverse=True)


def _up_to(ends: list[str], text: str) -> str:
    """A text up to the first of its ends, that included; nothing if it has none."""
    places = [(text.index(end), end) for end in ends if end in text]
    if not places:
        return ""
    first = min(place for place, _ in places)
    longest = next(end for place, end in places if place == first)
    return text[: first + len(longest)]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, asks: bool
) -> str:
    """A conversation in the template.

    Args:
        asks: whether the assistant's next turn begins in the end.

    Raises:
        MalformedConversationError, ConfigurationError: see ``prompt_tokens``.
    """
    set_chat_template(tokenizer)  # which raises where there is none
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=asks, tokenize=False
        )
    except Exception as error:  # of whatever kind what a template does ends in
        raise MalformedConversationError(
            f"the template refuses it: {short(error)}"
        ) from error
    return str(text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that is no beginning, or begins as the template says."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids)
