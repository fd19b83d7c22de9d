"""The target's hidden states of training windows, on disk, for runs that share them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.files import read_object, write_text

SETTINGS, HIDDEN, FILLED = "teacher.json", "hidden.bfloat16", "filled.uint8"


class TeacherCache:
    """Hidden states by window, written when they are first computed.

    With them the target's distributions are whole, at the cost of its output matrix.
    Several processes may write different windows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_windows: int,
        positions: int,
        width: int,
        windows: dict[str, Any],
    ) -> None:
        """
        Args:
            positions: of a window.
            width: the target's hidden size.
            windows: all that says which window an index is, and whose states they are.

        Raises:
            ConfigurationError: the folder holds the states of other windows.
        """
        folder.mkdir(parents=True, exist_ok=True)
        own = windows | {"positions": positions, "width": width}
        path = folder / SETTINGS
        if not path.is_file():
            write_text(path, json.dumps(own, indent=2) + "\n")
        theirs = read_object(path)
        for key, value in own.items():
            if theirs.get(key) != value:
                raise ConfigurationError(
                    f"teacher_cache={str(folder)!r} was made with {key}="
                    f"{theirs.get(key)!r}, not {value!r}; name another folder"
                )
        self._hidden = _mapped(
            folder / HIDDEN, np.uint16, (num_windows, positions, width)
        )
        self._filled = _mapped(folder / FILLED, np.uint8, (num_windows,))

    def read(self, windows: Tensor) -> Tensor | None:
        """[B, positions, width] bfloat16; None unless every one was written.

        Args:
            windows: [B] int64.
        """
        indices = windows.cpu().numpy()
        if not self._filled[indices].all():
            return None
        found = torch.from_numpy(self._hidden[indices])
        return found.view(torch.bfloat16).to(windows.device)

    def write(self, windows: Tensor, hidden: Tensor) -> None:
        indices = windows.cpu().numpy()
        bits = hidden.to("cpu", torch.bfloat16).contiguous().view(torch.uint16)
        self._hidden[indices] = bits.numpy()
        self._filled[indices] = 1


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A file that is as large as it must be, sparse where nothing was written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with path.open("ab") as file:
        if file.tell() < size:
            file.truncate(size)
    return np.memmap(path, dtype, "r+", shape=shape)
