"""Token windows for training: passages of books, and continuations by the target."""

import glob
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from vllm_budgetdraft.training.losses import IGNORED

#: Characters cut per token wanted; English needs about four.
CHARACTERS_PER_TOKEN = 6
#: Passages drawn in a row that may be too short before the books are held to be.
MAX_DRAWS = 1000


def unwrap(text: str) -> str:
    """Joins the hard-wrapped lines of prose paragraphs; verse keeps its lines."""

    def join(paragraph: str) -> str:
        lines = paragraph.split("\n")
        body = lines[:-1]
        prose = body and all(len(x) > 50 and not x.startswith(" ") for x in body)
        return " ".join(lines) if prose else paragraph

    return "\n\n".join(map(join, text.split("\n\n")))


def read_json_lines(pattern: str) -> Iterator[dict]:
    """Records of every ``.jsonl`` or ``.jsonl.xz`` file that a glob names.

    Raises:
        FileNotFoundError: the glob names no file.
    """
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern!r}")
    for path in paths:
        opener = lzma.open if path.endswith(".xz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


def read_books(pattern: str) -> list[str]:
    """Unwrapped texts of records that have a ``text``."""
    return [unwrap(record["text"]) for record in read_json_lines(pattern)]


class TokenWindows(IterableDataset):
    """Endless random windows of one prefix and one continuation.

    Every window of a batch has the same prefix length and the same source: with
    probability ``on_policy_fraction`` the ends of stored greedy continuations with
    their prompts, else passages of random books.

    Yields:
        ``prefix_ids``: [P] int64.
        ``continuation_ids``: [C] int64.
        ``labels``: [C] int64, on-policy windows only: the next tokens, which the target
            chose.
    """

    def __init__(
        self,
        *,
        books: str,
        continuations: str | None,
        tokenizer: PreTrainedTokenizerBase,
        prefix_tokens: list[int],
        continuation_tokens: int,
        on_policy_fraction: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._prefix_tokens = prefix_tokens
        self._continuation_tokens = continuation_tokens
        self._batch_size = batch_size
        self._seed = seed
        self._books = read_books(books)
        self._records: list[list[int]] = []
        self._on_policy_fraction = on_policy_fraction if continuations else 0.0
        if continuations:
            self._records = [
                record["prompt"] + record["continuation"]
                for record in read_json_lines(continuations)
                if len(record["continuation"]) >= continuation_tokens
            ]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = random.Random(self._seed)
        while True:
            prefix = rng.choice(self._prefix_tokens)
            length = prefix + self._continuation_tokens
            records = [r for r in self._records if len(r) >= length]
            on_policy = bool(records) and rng.random() < self._on_policy_fraction
            for _ in range(self._batch_size):
                if on_policy:
                    window = torch.tensor(rng.choice(records)[-length:])
                else:
                    window = torch.tensor(self._passage(rng, length))
                example = {
                    "prefix_ids": window[:prefix],
                    "continuation_ids": window[prefix:],
                }
                if on_policy:
                    unknown = torch.tensor([IGNORED])
                    example["labels"] = torch.cat([window[prefix + 1 :], unknown])
                yield example

    def _passage(self, rng: random.Random, length: int) -> list[int]:
        characters = CHARACTERS_PER_TOKEN * length
        for _ in range(MAX_DRAWS):
            book = rng.choice(self._books)
            start = rng.randrange(max(1, len(book) - characters))
            tokens = self._tokenizer(
                book[start : start + characters], add_special_tokens=False
            )["input_ids"]
            if len(tokens) >= length:
                return tokens[:length]
        raise ValueError(
            f"no passage of {length} tokens in {MAX_DRAWS} draws of a book; give "
            "longer books, or lower prefix_tokens or continuation_tokens"
        )


def write_run_files(folder: Path, arguments: dict, command: str) -> None:
    """What is needed to repeat a run, beside its checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(arguments, indent=2) + "\n")
    (folder / "train_command.txt").write_text(command + "\n")
