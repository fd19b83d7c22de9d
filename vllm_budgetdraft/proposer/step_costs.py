"""What a step costs by batch size and draft length, from times without requests."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: By draft length, or other numbers for each of these.
ByLength = NDArray[np.float64]


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step, T(B, k) = target(B (k + 1)) + draft(B, k).

    Attributes:
        target: of a pass of the target, by its number of tokens.
        draft: of drafts, by their length and the batch size; the shortest and longest
            length at least. Empty where drafting was not timed: it costs nothing then.
        max_length: tokens of the longest draft.
        are_uniform: whether the target's graphs are of batches in which every request
            verifies as many drafts.
    """

    target: Mapping[int, float]
    draft: Mapping[int, Mapping[int, float]]
    max_length: int
    are_uniform: bool = False

    def by_length(self, batch_size: int) -> ByLength:
        """Seconds for every length from 0 on, [max_length + 1]."""
        lengths = np.arange(self.max_length + 1, dtype=np.float64)
        seconds = _interpolate(self.target, batch_size * (lengths + 1))
        if self.draft:
            size = np.array([batch_size], dtype=float)
            known = [_interpolate(each, size)[0] for each in self.draft.values()]
            seconds[1:] += np.interp(lengths[1:], [*self.draft], known)
        return seconds

    def token_seconds(self, batch_size: int, length: int) -> float:
        """Seconds to verify one draft more, on average over the drafts of a batch."""
        num_tokens = batch_size * np.array([1.0, length + 1.0])
        first, last = _interpolate(self.target, num_tokens)
        return float(last - first) / (batch_size * length)


def _interpolate(known: Mapping[int, float], at: ByLength) -> ByLength:
    """Straight between points, and beyond the last one on as between the last two.

    What took longer than something larger was disturbed, and is taken for as fast.
    """
    points = np.array([*known], dtype=float)
    values = np.array([*known.values()])
    values = np.minimum.accumulate(values[::-1])[::-1]
    result = np.interp(at, points, values)
    if len(points) > 1:
        slope = (values[-1] - values[-2]) / (points[-1] - points[-2])
        result += slope * np.maximum(at - points[-1], 0)
    return np.asarray(result)
