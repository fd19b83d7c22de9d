"""The tensors in a drafter's folder: what is there, and as which numbers.

Their names, shapes and types are in the files' headers, so that a folder can be refused
before anything large loads. Weights stored as codes with scales are multiplied out.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_budgetdraft.errors import UnsupportedDrafterError, short

#: Types of weights, as headers name them, and of codes that a scale makes weights of.
FLOATS, CODES = ("F32", "F16", "BF16"), ("I8", "F8_E4M3")
#: What a scale of codes is called: its weight's name and this.
SCALES = ("_scale", "_scale_inv")
#: Ends of names that change nothing here: of activations that are not quantised, and of
#: what is computed anew.
WITHOUT_EFFECT = ("input_scale", "k_scale", "v_scale", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; ``kind`` is its type."""

    file: Path
    kind: str
    shape: tuple[int, ...]


class StoredWeights:
    """The tensors of a folder, by name; none is read before it is asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        """
        Args:
            name: of the file, where there is no index of several.

        Raises:
            UnsupportedDrafterError: a file is missing, or is not safetensors.
        """
        self._folder = folder
        self._tensors: dict[str, Stored] = {}
        self._quantization: dict[str, Any]
        for file in _files(folder, name):
            self._tensors |= _header(file)
        text = (folder / "config.json").read_text(encoding="utf-8")
        self._quantization = json.loads(text).get("quantization_config") or {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def lacks(self, name: str) -> bool:
        return name not in self._tensors

    def check(
        self, expected: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()
    ) -> None:
        """
        Args:
            expected: shapes of all that is needed, by name.
            ignored: beginnings of names that are of no account.

        Raises:
            UnsupportedDrafterError: a tensor is missing, of another shape or of a type
                that cannot be read; or there is one that would change the model.
        """
        missing = [name for name in expected if name not in self._tensors]
        known = {*expected, *(n + end for n in expected for end in SCALES)}
        unread = [
            name
            for name in self._tensors
            if name not in known
            and not name.startswith(ignored)
            and not name.endswith(WITHOUT_EFFECT)
        ]
        method = self._quantization.get("quant_method")
        if method and (missing or unread):
            raise UnsupportedDrafterError(
                f"{self._folder} is quantised by {method!r:.100} ({_some(unread)}); "
                "drafters are read in 16 or 32 bits, and in int8 or FP8 with scales of "
                "tensors, rows or blocks: give the model as it was before"
            )
        if missing:
            raise UnsupportedDrafterError(
                f"{self._folder} lacks the weights {_some(missing)}, which config.json "
                "speaks of; download or copy both anew"
            )
        if unread:
            raise UnsupportedDrafterError(
                f"{self._folder} has the weights {_some(unread)}, which no model has "
                "that config.json speaks of; download or copy both anew"
            )
        for name, shape in expected.items():
            self._check_tensor(name, shape)

    def read(self, name: str) -> Tensor:
        """As it is stored, or multiplied out in bfloat16.

        Raises:
            UnsupportedDrafterError: it has values that are not finite.
        """
        value = self._load(name)
        if self._tensors[name].kind in CODES:
            scale, tile = self._scale_of(name)
            assert tile is not None, name
            value = dequantised(value, self._load(scale), tile)
        if not bool(value.isfinite().all()):
            raise UnsupportedDrafterError(
                f"{self._folder}: {name} has values that are not finite; download or "
                "copy the weights anew, or train from others"
            )
        return value

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self._tensors[name]
        if stored.shape != shape:
            raise UnsupportedDrafterError(
                f"{self._folder}: {name} has shape {stored.shape}, config.json says "
                f"{shape}; they are of two models: download or copy both anew"
            )
        if stored.kind in FLOATS:
            return
        scale, tile = self._scale_of(name)
        if stored.kind not in CODES or tile is None:
            of_scale = self._tensors[scale].shape if scale else "no scale"
            raise UnsupportedDrafterError(
                f"{self._folder}: {name} is of type {stored.kind} and shape {shape}, "
                f"with {of_scale}; drafters are read from {', '.join(FLOATS)}, or from "
                f"{', '.join(CODES)} with scales of tensors, rows or blocks: give the "
                "model as it was before it was quantised"
            )

    def _scale_of(self, name: str) -> tuple[str, tuple[int, int] | None]:
        """The name of a weight's scale, or "", and the block that shares a number."""
        found = (name + end for end in SCALES if name + end in self._tensors)
        if (scale := next(found, "")) == "":
            return "", None
        block = self._quantization.get("weight_block_size")
        shapes = self._tensors[name].shape, self._tensors[scale].shape
        return scale, tile_of(*shapes, block)

    def _load(self, name: str) -> Tensor:
        with safe_open(self._tensors[name].file, "pt") as file:
            value: Tensor = file.get_tensor(name)
        return value


def dequantised(codes: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """Codes [rows, columns] times their scales, in bfloat16.

    Args:
        tile: rows and columns that share a scale; see ``tile_of``.
    """
    rows, columns = codes.shape
    scales = scales.float().reshape(-(-rows // tile[0]), -(-columns // tile[1]))
    for dim, size in enumerate(tile):
        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
    return (codes.float() * scales).bfloat16()


def tile_of(
    codes: tuple[int, ...], scales: tuple[int, ...], block: Any
) -> tuple[int, int] | None:
    """Rows and columns of codes that share a scale, from both shapes.

    Args:
        block: the same, as a config says it of scales of blocks; None if it does not.

    Returns:
        None if these are no scales of the tensor, its rows or its blocks.
    """
    if len(codes) != 2:
        return None
    rows, columns = codes
    if scales in ((), (1,), (1, 1)):
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    if isinstance(block, list) and [type(n) for n in block] == [int, int]:
        tile = block[0], block[1]
        if min(tile) > 0 and scales == (-(-rows // tile[0]), -(-columns // tile[1])):
            return tile
    return None


def _some(names: list[str]) -> str:
    shown = ", ".join(short(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _files(folder: Path, name: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / name]
    try:
        shards = set(
            json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        )
        outside = [each for each in shards if Path(each).name != each]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedDrafterError(
            f"{index} is no index of weights ({type(error).__name__}: {short(error)}); "
            "download it anew"
        ) from error
    if outside or not shards:
        raise UnsupportedDrafterError(
            f"{index} names {_some(sorted(outside)) or 'no files'}; it must name files "
            "of its folder: download it anew, from a source that you trust"
        )
    return [folder / shard for shard in sorted(shards)]


def _header(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        raise UnsupportedDrafterError(
            f"{file} is missing; drafters are read from safetensors only: convert "
            "pickled weights with transformers' save_pretrained on a machine that "
            "trusts them"
        )
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {
                name: Stored(file, each.get_dtype(), tuple(each.get_shape()))
                for name, each in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UnsupportedDrafterError(
            f"{file} is not safetensors ({short(error)}); download it anew, whole: "
            "Git LFS leaves a small text in its place"
        ) from error


def write_weights(file: Path, weights: dict[str, Tensor]) -> None:
    """A safetensors file, for all to read who may read ``config.json`` beside it.

    safetensors makes files that their owner alone can read.
    """
    save_file(weights, file, metadata={"format": "pt"})
    shutil.copymode(file.with_name("config.json"), file)
