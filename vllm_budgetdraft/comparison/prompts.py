"""Prompts of a given number of tokens, from books and meetings; and short chats.

Three tasks are those of BudgetDraft's section 4: passages of books (PG-19), questions
about meetings (QMSum, in LongBench's words), and summaries of a passage (LWM). Unlike
theirs, a prompt that is too short for its length is left out, not counted as that long.
In a chat template, instruction and passage are the user's message. See ``questions``
for the fourth, ``chat``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset

from vllm_budgetdraft.conversations import encode, render
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation.acceptance import passages
from vllm_budgetdraft.training.questions import questions
from vllm_budgetdraft.training.sources import open_source, read_texts

EXCERPT = Path(__file__).with_name("excerpt.txt")

CHAT = "chat"
#: Stands for a passage while a template is applied.
PASSAGE = "[the passage]"
#: What a chat model is asked; any other goes on with a book by itself.
BOOK = (
    "Read this part of a book.\n\n",
    "\n\nContinue the part above from where it ends, in the words of its author.",
)
SUMMARY = (
    "Read this part of a book.\n\n",
    "\n\nWrite a summary of the part above in your own words.\n\nSummary:",
)
MEETING = (
    "You are given a meeting transcript and a query containing a question or "
    "instruction. Answer the query in one or more sentences.\n\nTranscript:\n",
    "\n\nNow, answer the query based on the above meeting transcript in one or more "
    "sentences.\n\nQuery: {query}\nAnswer:",
)


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        context_tokens: length of all prompts of its kind, or of the longest of them
            where prompts are as long as they are.
        index: its number among those of its task and length.
    """

    task: str
    context_tokens: int
    index: int
    token_ids: list[int]


def build_prompts(
    tokenizer: Any,
    sources: dict[str, str],
    *,
    lengths: list[int],
    count: int,
    unwraps_lines: bool = False,
    uses_template: bool = False,
    tell: Callable[[str], None] = print,
    seed: int = 0,
) -> list[Prompt]:
    """``count`` of each task and length; chats have no length but that of the longest.

    Args:
        sources: what each task reads, as ``training.sources.open_source`` takes it;
            books have a column ``text``, meetings ``context`` and ``input``.
        uses_template: the tokenizer's chat template, where it has one; ``chat`` needs
            it then.
        tell: is told which rows of chats are left out.

    Raises:
        ConfigurationError: an unknown task or source, texts that are too short, or no
            chat template where one is needed.
    """
    prompts = []
    in_template = uses_template and bool(tokenizer.chat_template)
    for task, source in sources.items():
        if task == CHAT:
            found = questions(
                tokenizer,
                source,
                longest=max(lengths),
                count=count,
                rng=Random(f"{seed} {task}"),
                uses_template=uses_template,
                tell=tell,
            )
            longest = max(map(len, found))
            prompts += [Prompt(task, longest, *each) for each in enumerate(found)]
            continue
        if task not in TASKS:
            raise ConfigurationError(
                f"there is no task {task!r}; choose from {', '.join([*TASKS, CHAT])}"
            )
        rows = TASKS[task](tokenizer, source, unwraps_lines, in_template)
        for length in lengths:
            rng = Random(f"{seed} {task} {length}")
            for index, tokens in enumerate(rows(length, count, rng)):
                prompts.append(Prompt(task, length, index, tokens))
    return prompts


def _books(tokenizer: Any, source: str, unwraps_lines: bool, in_template: bool) -> Any:
    words = BOOK if in_template else ("", "")
    frame = _frame(tokenizer, words, in_template)
    return _framed_passages(tokenizer, source, unwraps_lines, *frame)


def _summaries(
    tokenizer: Any, source: str, unwraps_lines: bool, in_template: bool
) -> Any:
    frame = _frame(tokenizer, SUMMARY, in_template)
    return _framed_passages(tokenizer, source, unwraps_lines, *frame)


def _framed_passages(
    tokenizer: Any, source: str, unwraps_lines: bool, head: list[int], tail: list[int]
) -> Any:
    if Path(source) == EXCERPT:  # which goes on: it has no end of text
        tokens = encode(tokenizer, EXCERPT.read_text(encoding="utf-8"))
        texts = Dataset.from_dict({"input_ids": [tokens]})
    else:
        texts = read_texts([source], tokenizer, unwraps_lines=unwraps_lines)

    def build(length: int, count: int, rng: Random) -> list[list[int]]:
        size = _room(length, head, tail)
        found = passages(texts, size, count, rng.randrange(2**31))
        return [head + body + tail for body in found]

    return build


def _meetings(
    tokenizer: Any, source: str, unwraps_lines: bool, in_template: bool
) -> Any:
    rows = open_source(source)
    if not {"context", "input"} <= set(rows.column_names):
        raise ConfigurationError(
            f"{source!r} has the columns {rows.column_names}; meetings have 'context' "
            "and 'input'"
        )
    before, after = MEETING
    encoded: dict[str, list[int]] = {}

    def build(length: int, count: int, rng: Random) -> list[list[int]]:
        """The middle of a meeting is left out, as LongBench does."""
        found: list[list[int]] = []
        for row in rng.sample(range(len(rows)), len(rows)):
            meeting, query = rows[row]["context"], rows[row]["input"]
            if meeting not in encoded:
                encoded[meeting] = encode(tokenizer, meeting)
            words = before, after.format(query=query)
            head, tail = _frame(tokenizer, words, in_template)
            size, body = _room(length, head, tail), encoded[meeting]
            if len(body) >= size:
                kept = body[: size - size // 2] + body[len(body) - size // 2 :]
                found.append(head + kept + tail)
            if len(found) == count:
                return found
        raise ConfigurationError(
            f"{source!r} has {len(found)} meetings of {length} tokens and more, "
            f"{count} are asked for; ask for fewer prompts, or leave this length out"
        )

    return build


TASKS = {"books": _books, "qmsum": _meetings, "summary": _summaries}


def _frame(
    tokenizer: Any, words: tuple[str, str], in_template: bool
) -> tuple[list[int], list[int]]:
    """Tokens before and after a passage, which has words around it.

    Raises:
        ConfigurationError: the template does not have a message as it is, once.
    """
    before, after = words
    if not in_template:  # what the tokenizer begins a text with comes first
        return list(tokenizer(before)["input_ids"]), encode(tokenizer, after)
    message = {"role": "user", "content": before + PASSAGE + after}
    parts = render(tokenizer, [message], asks=True).split(PASSAGE)
    if len(parts) != 2:
        raise ConfigurationError(
            f"the chat template has a user's message {len(parts) - 1} times, and a "
            "passage must stand in it once; give another --chat-template, or "
            "--skip-chat-template"
        )
    return encode(tokenizer, parts[0]), encode(tokenizer, parts[1])


def _room(length: int, head: list[int], tail: list[int]) -> int:
    size = length - len(head) - len(tail)
    if size < 1:
        raise ConfigurationError(
            f"a prompt of {length} tokens has no room beside its instructions, which "
            f"take {length - size}; use a longer one"
        )
    return size
