"""Token windows for training: of any text, and of what the target wrote itself."""

from random import Random

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.objectives import IGNORED
from vllm_budgetdraft.training.token_streams import AnswerStream, TokenStream


class TokenWindows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random windows of a prefix and a continuation, the same ones for a seed.

    Windows are cut anywhere from all texts, one after the other, or so that they end
    within what the target or an assistant wrote; short documents share one. All windows
    of an optimizer step have the same prefix length and source.

    Each has:
        ``window``: its index.
        ``prefix_ids``: [P] int64.
        ``continuation_ids``: [C] int64.
        ``counted``: [C] bool, where the next token is to be predicted.
        ``next_ids``: [C] int64, the next token, which the target wrote, or ``IGNORED``;
            not of texts and conversations.
        ``top_ids``, ``top_logprobs``: [C, n], of the next token, if they were stored.
        ``temperatures``: [C] float32, at which it was drawn; 1 where that is unknown.
    """

    def __init__(
        self,
        texts: Dataset | None,
        continuations: Dataset | None,
        *,
        prefix_tokens: list[int],
        continuation_tokens: int,
        on_policy_fraction: float,
        windows_per_step: int,
        num_windows: int,
        seed: int,
        conversations: Dataset | None = None,
    ) -> None:
        """
        Args:
            on_policy_fraction: share of windows of continuations, if there are others.
            conversations: as ``read_conversations`` gives them; with texts, each is
                half of the rest.

        Raises:
            ConfigurationError: there are fewer tokens than in a window.
        """
        self._prefix_tokens = prefix_tokens
        self._continuation_tokens = continuation_tokens
        self._windows_per_step = windows_per_step
        self._num_windows, self._seed = num_windows, seed
        self._texts = None if texts is None else TokenStream(texts, ["input_ids"])
        self._continuations = self._conversations = None
        if continuations is not None:
            self._continuations = AnswerStream(continuations)
        if conversations is not None:
            self._conversations = AnswerStream(conversations)
        self._fraction = on_policy_fraction
        if continuations is None:
            self._fraction = 0.0
        elif texts is None and conversations is None:
            self._fraction = 1.0
        longest = max(prefix_tokens) + continuation_tokens
        for name, stream in (
            ("texts", self._texts),
            ("conversations", self._conversations),
            ("continuations", self._continuations),
        ):
            if stream is not None and stream.num_tokens < longest:
                raise ConfigurationError(
                    f"{name} have {stream.num_tokens} tokens, fewer than the {longest} "
                    "of a window (prefix_tokens and continuation_tokens); give more, "
                    "or shorten the window"
                )

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._num_windows:
            raise IndexError(index)
        # Seeds are text, for those that are numbers give similar first draws.
        step = Random(f"{self._seed} step {index // self._windows_per_step}")
        length = step.choice(self._prefix_tokens) + self._continuation_tokens
        cut = self._of_texts
        if step.random() < self._fraction:
            cut = self._written_by_target
        elif self._texts is None or (
            self._conversations is not None and step.random() < 0.5
        ):
            cut = self._of_conversations
        rng = Random(f"{self._seed} window {index}")
        return {"window": torch.tensor(index), **cut(rng, length)}

    def _of_texts(self, rng: Random, length: int) -> dict[str, Tensor]:
        stream = self._texts
        assert stream is not None
        start = rng.randrange(stream.num_tokens - length + 1)
        ids = [
            row["input_ids"][part] for row, part in stream.pieces(start, start + length)
        ]
        return self._cut(np.concatenate(ids)) | {
            "counted": torch.ones(self._continuation_tokens, dtype=torch.bool),
            "temperatures": torch.ones(self._continuation_tokens),
        }

    def _of_conversations(self, rng: Random, length: int) -> dict[str, Tensor]:
        """What an assistant wrote counts, and says nothing of the target's choice."""
        assert self._conversations is not None
        window = self._of_answers(self._conversations, rng, length)
        del window["next_ids"]
        return window

    def _written_by_target(self, rng: Random, length: int) -> dict[str, Tensor]:
        assert self._continuations is not None
        return self._of_answers(self._continuations, rng, length)

    def _of_answers(
        self, stream: AnswerStream, rng: Random, length: int
    ) -> dict[str, Tensor]:
        # Those that fill a window alone, if there are any.
        enough = np.flatnonzero(stream.lengths > length)
        index = int(rng.choice(enough if len(enough) else range(len(stream.lengths))))
        spare = max(0, int(stream.written[index]) - self._continuation_tokens - 1)
        end = stream.end_of(index) - rng.randint(0, spare)
        ids, written, temperatures, tops = [], [], [], []
        # One token more: the next one of the last.
        for row, part in stream.pieces(end - length - 1, end):
            prompt, continuation = row["prompt"], row["continuation"]
            ids.append(np.concatenate([prompt, continuation])[part])
            written.append(
                (np.arange(len(prompt) + len(continuation)) >= len(prompt))[part]
            )
            temperature = np.float32(row.get("temperature", 1))
            temperatures.append(np.full(part.stop - part.start, temperature))
            if "top_ids" in row:
                tops.append(
                    [
                        _padded(row[name], len(prompt))[part]
                        for name in ("top_ids", "top_logprobs")
                    ]
                )
        last = slice(-self._continuation_tokens, None)
        tokens, counted = np.concatenate(ids), np.concatenate(written)[last]
        window = self._cut(tokens[:-1]) | {
            "counted": torch.from_numpy(counted),
            "next_ids": torch.from_numpy(np.where(counted, tokens[last], IGNORED)),
            "temperatures": torch.from_numpy(np.concatenate(temperatures)[last]),
        }
        if tops:
            top_ids, top_logprobs = (
                np.concatenate(each)[last] for each in zip(*tops, strict=True)
            )
            window["top_ids"] = torch.from_numpy(top_ids).long()
            window["top_logprobs"] = torch.from_numpy(top_logprobs).float()
        return window

    def _cut(self, tokens: np.ndarray) -> dict[str, Tensor]:
        ids = torch.from_numpy(tokens).long()
        prefix, continuation = ids.split(
            (len(ids) - self._continuation_tokens, self._continuation_tokens)
        )
        return {"prefix_ids": prefix, "continuation_ids": continuation}


def _padded(rows: np.ndarray, num_before: int) -> np.ndarray:
    """[n, k] with zeros before it."""
    return np.pad(rows, ((num_before, 0), (0, 0)))
