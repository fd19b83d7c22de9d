"""Conversations whose answers the target writes anew, each in its own context."""

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from vllm_budgetdraft.conversations import (
    MalformedConversationError,
    Message,
    messages_of,
    prompt_tokens,
    set_chat_template,
)
from vllm_budgetdraft.drafter.join import of_target
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.files import read_object, write_text
from vllm_budgetdraft.generation.engine import Engine, Write
from vllm_budgetdraft.generation.parts import missing_parts, write_part
from vllm_budgetdraft.training.sources import open_source

#: How many answers there are in each file, and how its conversations ended.
COUNTS = "counts.json"

#: How a conversation can end, in words for people; each ends in one way.
COMPLETE, TOO_LONG, EMPTY, MALFORMED = ENDS = (
    "complete",
    "too long",
    "empty",
    "malformed",
)
#: Answers, and those that had no end within --new-tokens.
ANSWERS, CUT = "answers", "cut"


class Chat:
    """One conversation at one temperature.

    Attributes:
        end: how it ended; None while it goes on.
        why: more of that.
    """

    def __init__(self, row: dict[str, Any], name: str, temperature: float) -> None:
        """
        Args:
            name: by which its draws differ from those of others.
        """
        self.temperature = temperature
        self.end: str | None = None
        self.why = ""
        self.prompt: list[int] = []
        self._name, self._turn = name, 0
        self._context: list[Message] = []
        self._left: list[Message] = []
        try:
            messages = messages_of(row)
        except MalformedConversationError as error:
            self._stop(MALFORMED, str(error))
            return
        # What somebody else answered is not kept.
        self._left = [each for each in messages if each["role"] != "assistant"]
        if not any(
            each["role"] == "user" and each["content"].strip() for each in self._left
        ):
            self._stop(EMPTY)

    def ask(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        """Sets ``prompt``, up to the next answer, unless it ends here."""
        while self._left:
            message = self._left.pop(0)
            self._context.append(message)
            if message["role"] == "user":
                break
        else:
            self._stop(COMPLETE)
            return
        try:
            self.prompt = prompt_tokens(tokenizer, self._context)
        except MalformedConversationError as error:
            self._stop(MALFORMED, str(error))
            return
        if len(self.prompt) > longest:
            self._stop(TOO_LONG)

    @property
    def seed(self) -> int:
        """Of the next answer; the same whoever else is asked beside it."""
        return Random(f"{self._name} {self.temperature} {self._turn}").randrange(2**31)

    def answer(self, text: str) -> None:
        """Goes on after what the target wrote, as clients do, be it cut or not."""
        self._context.append({"role": "assistant", "content": text})
        self._turn += 1

    def _stop(self, end: str, why: str = "") -> None:
        self.end, self.why = end, why


def write_chats(
    chats: list[Chat],
    tokenizer: PreTrainedTokenizerBase,
    write: Write,
    longest: int,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of all answers, and counts: ``ENDS`` of chats, ``ANSWERS`` and ``CUT``.

    Args:
        longest: tokens of a prompt.
    """
    rows: list[dict[str, Any]] = []
    num_cut = 0
    while True:
        for chat in chats:
            if chat.end is None:
                chat.ask(tokenizer, longest)
        asked = [chat for chat in chats if chat.end is None]
        if not asked:
            break
        answers = write(
            [chat.prompt for chat in asked],
            [chat.temperature for chat in asked],
            [chat.seed for chat in asked],
        )
        for chat, answer in zip(asked, answers, strict=True):
            rows.append(answer.row(chat.prompt, chat.temperature))
            num_cut += not answer.has_ended
            chat.answer(tokenizer.decode(answer.token_ids, skip_special_tokens=True))
    counts = Counter(chat.end for chat in chats if chat.end)
    return rows, counts + Counter({ANSWERS: len(rows), CUT: num_cut})


def run(args: Namespace, output: Path) -> None:
    """Writes files that are missing, and how the conversations of each file ended.

    Raises:
        ConfigurationError: see ``open_source`` and ``set_chat_template``; or there is
            no room for a prompt.
    """
    sources = [open_source(source) for source in args.conversations]
    num_rows = sum(map(len, sources))
    counts_file = output / COUNTS
    known = read_object(counts_file) if counts_file.is_file() else {}
    parts = missing_parts(range(num_rows), args.prompts_per_file, output)
    if parts:
        tokenizer = of_target(args.target, AutoTokenizer.from_pretrained)
        set_chat_template(tokenizer, args.chat_template)
        limit = _positions_of(args.target)
        max_model_len = args.max_model_len or limit
        longest = max_model_len - args.new_tokens
        if longest < 1 or max_model_len > limit:
            raise ConfigurationError(
                f"--max-model-len {max_model_len} and --new-tokens {args.new_tokens} "
                f"leave no prompt within the target's {limit} positions "
                "(max_position_embeddings); change one of them"
            )
        engine = Engine(args, max_model_len, draws=any(args.temperature))
    for path, indices in parts.items():
        chats = [
            Chat(_row(sources, index), f"{args.seed} {index}", temperature)
            for temperature in args.temperature
            for index in indices
        ]
        rows, counts = write_chats(chats, tokenizer, engine.write, longest)
        malformed = next((chat.why for chat in chats if chat.why), None)
        known[path.name] = dict(counts)
        if malformed:
            known[path.name]["first malformed"] = malformed
        text = json.dumps(known, indent=1) + "\n"
        write_text(counts_file, text)
        write_part(path, rows, args.top_logprobs)
    _tell_counts(known, num_rows, len(args.temperature))


def _positions_of(target: str) -> int:
    # Models of text and images keep it in a part of their configuration.
    config = of_target(target, AutoConfig.from_pretrained).get_text_config()
    positions: int = config.max_position_embeddings
    return positions


def _row(sources: list[Any], index: int) -> dict[str, Any]:
    for rows in sources:
        if index < len(rows):
            row: dict[str, Any] = rows[index]
            return row
        index -= len(rows)
    raise IndexError(index)


def _tell_counts(
    counts: dict[str, dict[str, Any]], num_rows: int, num_temperatures: int
) -> None:
    total: Counter[str] = Counter()
    for each in counts.values():
        total.update({k: v for k, v in each.items() if isinstance(v, int)})
    ends = ", ".join(f"{total[end]} {end}" for end in ENDS)
    print(
        f"{num_rows} conversations at {num_temperatures} temperatures: {ends}; "
        f"{total[ANSWERS]} answers, {total[CUT]} of them cut at --new-tokens"
    )
    whys = (each.get("first malformed") for each in counts.values())
    if why := next(filter(None, whys), None):
        print(f"the first that is malformed has {why}")
