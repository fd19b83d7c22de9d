"""Ranges of numbers, as tensors of a device."""

from collections.abc import Iterable

import torch
from torch import Tensor


def runs(numbers: Iterable[int]) -> list[range]:
    """Neighbours that ascend by one, together."""
    found: list[range] = []
    for number in numbers:
        if found and number == found[-1].stop:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def packed_ranges(ranges: Iterable[range], device: torch.device) -> Tensor:
    """What ranges have, one after another, int64.

    It is made on the device. A copy from the host would have it wait for all that a GPU
    has not done yet.
    """
    return torch.cat([torch.arange(x.start, x.stop, device=device) for x in ranges])
