"""Documents one after the other: where each begins, and what is between two places."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset


class TokenStream:
    """Documents one after the other, as one sequence of tokens."""

    def __init__(self, rows: Dataset, columns: list[str]) -> None:
        """
        Args:
            columns: which hold a document's tokens, one after the other.
        """
        self._rows = rows.with_format("numpy")
        self.lengths = np.sum([column_lengths(rows, each) for each in columns], 0)
        self._ends = self.lengths.cumsum()

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def end_of(self, index: int) -> int:
        """Where a document ends."""
        return int(self._ends[index])

    def pieces(self, start: int, end: int) -> Iterator[tuple[dict[str, Any], slice]]:
        """Rows that are in [start, end), and which of their tokens; both may wrap."""
        while start < end:
            place = start % self.num_tokens
            index = bisect_right(self._ends, place)
            before = self.end_of(index) - int(self.lengths[index])
            first = place - before
            last = min(int(self.lengths[index]), first + end - start)
            yield self._rows[index], slice(first, last)
            start += last - first


class AnswerStream(TokenStream):
    """Prompts with what was written after them.

    Attributes:
        written: [len(rows)], the tokens of that.
    """

    def __init__(self, rows: Dataset) -> None:
        super().__init__(rows, ["prompt", "continuation"])
        self.written = column_lengths(rows, "continuation")


def column_lengths(rows: Dataset, column: str) -> np.ndarray:
    """Of the list in each row, [len(rows)] int64, without reading them."""
    lengths = pyarrow.compute.list_value_length(rows.flatten_indices().data[column])
    array: np.ndarray = lengths.to_numpy()
    return array.astype(np.int64)
