"""Conversations in the layouts that data sets have, and in a model's chat template."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vllm_budgetdraft.errors import ConfigurationError

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


def messages_of(row: dict[str, Any]) -> list[Message]:
    """The messages of a row; none where it has no such column, or an empty one.

    Strings in place of messages, as MT-bench's ``turns`` are, are the user's.

    Raises:
        MalformedConversationError: a message of another kind than text by the system,
            the user or the assistant.
    """
    column = next((each for each in COLUMNS if row.get(each)), None)
    return [] if column is None else [_message(each) for each in row[column]]


def _message(given: Any) -> Message:
    if isinstance(given, str):
        return {"role": "user", "content": given}
    if not isinstance(given, dict):
        raise MalformedConversationError(f"a {type(given).__name__} for a message")
    name = given.get("role") or given.get("from")
    if name not in ROLES:
        raise MalformedConversationError(f"a message by {name!r}")
    content = given.get("content")
    content = given.get("value") if content is None else content
    if isinstance(content, list):  # of parts, as OpenAI has them
        kinds = {part.get("type") for part in content}
        if kinds - {"text"}:
            raise MalformedConversationError(f"parts of the types {sorted(kinds)}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise MalformedConversationError(f"a message by {name!r} without text")
    return {"role": ROLES[name], "content": content}


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
        template = Path(template).read_text(encoding="utf-8")
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
    return _encode(tokenizer, _render(tokenizer, messages, asks=True))


def answers(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> list[tuple[list[int], list[int]]]:
    """Of each of the assistant's turns: the tokens before it, and its own.

    What comes before is what a model that serves would have read: some templates leave
    out of earlier turns what a model thought. Prompt and answer are tokenized apart,
    as they are there. An answer ends with what ends a turn, if the template says that
    by the tokenizer's end of text.

    Raises:
        MalformedConversationError: the template refuses it, or begins an answer with
            what this one does not begin with, a thought most likely.
        ConfigurationError: the tokenizer has no chat template.
    """
    found = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:index], asks=True)
        stub = {"role": "assistant", "content": ANSWER}
        whole = _render(tokenizer, [*messages[:index], stub], asks=False)
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
        end = tokenizer.eos_token
        if end and end in after:
            answer += after.partition(end)[0] + end
        found.append((_encode(tokenizer, asked), _encode(tokenizer, answer)))
    return found


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, asks: bool
) -> str:
    set_chat_template(tokenizer)  # or there is none
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=asks, tokenize=False
        )
    except TemplateError as error:
        raise MalformedConversationError(f"the template refuses it: {error}") from error
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes what a text begins with.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids)
