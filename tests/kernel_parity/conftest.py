"""Kernels held to their definitions: interpreted, or as they are where a GPU is."""

import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
if not HAS_TRITON:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure() -> None:
    """After that of all tests, which says whether kernels are interpreted."""
    if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
        from tests.support import interpreter

        interpreter.mend()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operations allocate holds NaN, so that an output left out shows."""

    def poisoned(allocate):
        def allocated(*args, **kwargs) -> Tensor:
            x = allocate(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(torch.nan)
            return x.fill_(torch.iinfo(x.dtype).min)

        return allocated

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


@pytest.fixture(autouse=True)
def infinities_are_meant() -> Iterator[None]:
    """An interpreted kernel takes logarithms of zero as a GPU does: silently."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        yield
