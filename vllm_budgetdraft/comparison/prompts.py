"""Prompts of exactly so many tokens, from books and from meetings.

The tasks are those of BudgetDraft's section 4: passages of books (PG-19), questions
about meetings (QMSum, in LongBench's words), and summaries of a passage (LWM). Unlike
theirs, a prompt that is too short for its length is left out, not counted as that long.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation.acceptance import passages
from vllm_budgetdraft.training.data import open_source, read_texts

EXCERPT = Path(__file__).with_name("excerpt.txt")

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
    seed: int = 0,
) -> list[Prompt]:
    """``count`` of each task and length.

    Args:
        sources: what each task reads, as ``training.data.open_source`` takes it; books
            have a column ``text``, meetings ``context`` and ``input``.

    Raises:
        ConfigurationError: an unknown task or source, or texts that are too short.
    """
    prompts = []
    for task, source in sources.items():
        if task not in TASKS:
            raise ConfigurationError(
                f"there is no task {task!r}; choose from {', '.join(TASKS)}"
            )
        rows = TASKS[task](tokenizer, source, unwraps_lines)
        for length in lengths:
            rng = Random(f"{seed} {task} {length}")
            for index, tokens in enumerate(rows(length, count, rng)):
                prompts.append(Prompt(task, length, index, tokens))
    return prompts


def _books(tokenizer: Any, source: str, unwraps_lines: bool) -> Any:
    return _framed_passages(tokenizer, source, unwraps_lines, "", "")


def _summaries(tokenizer: Any, source: str, unwraps_lines: bool) -> Any:
    return _framed_passages(tokenizer, source, unwraps_lines, *SUMMARY)


def _framed_passages(
    tokenizer: Any, source: str, unwraps_lines: bool, before: str, after: str
) -> Any:
    if Path(source) == EXCERPT:  # which goes on: it has no end of text
        tokens = _encode(tokenizer, EXCERPT.read_text(encoding="utf-8"))
        texts = Dataset.from_dict({"input_ids": [tokens]})
    else:
        texts = read_texts([source], tokenizer, unwraps_lines=unwraps_lines)
    # What the tokenizer begins a text with.
    head = tokenizer(before)["input_ids"]
    tail = _encode(tokenizer, after)

    def build(length: int, count: int, rng: Random) -> list[list[int]]:
        size = _room(length, head, tail)
        found = passages(texts, size, count, rng.randrange(2**31))
        return [head + body + tail for body in found]

    return build


def _meetings(tokenizer: Any, source: str, unwraps_lines: bool) -> Any:
    rows = open_source(source)
    if not {"context", "input"} <= set(rows.column_names):
        raise ConfigurationError(
            f"{source!r} has the columns {rows.column_names}; meetings have 'context' "
            "and 'input'"
        )
    head = tokenizer(MEETING[0])["input_ids"]
    encoded: dict[str, list[int]] = {}

    def build(length: int, count: int, rng: Random) -> list[list[int]]:
        """The middle of a meeting is left out, as LongBench does."""
        found: list[list[int]] = []
        for row in rng.sample(range(len(rows)), len(rows)):
            meeting, query = rows[row]["context"], rows[row]["input"]
            if meeting not in encoded:
                encoded[meeting] = _encode(tokenizer, meeting)
            tail = _encode(tokenizer, MEETING[1].format(query=query))
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


def _room(length: int, head: list[int], tail: list[int]) -> int:
    size = length - len(head) - len(tail)
    if size < 1:
        raise ConfigurationError(
            f"a prompt of {length} tokens has no room beside its instructions, which "
            f"take {length - size}; use a longer one"
        )
    return size


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(tokens)
