"""Block sizes by device. Chosen by measurement, never by trying on the serving path."""

from dataclasses import dataclass
from functools import cache

import torch

#: Most programs that share one KV head of one request; bounds the merge's tile.
MAX_SPLITS = 32


@dataclass(frozen=True)
class LaunchSettings:
    """How the kernels cut their work on one kind of device.

    Attributes:
        attention_tile_bytes: keys, and as many values, that a program holds at a time;
            half as many of float32.
        attention_stages: tiles in flight.
        programs_per_multiprocessor: splits are added until each multiprocessor has
            this number of programs.
        cache_write_heads: heads of one token per program, at most.
        compaction_rows: kept positions per program.
        chunk_scores_tokens: tokens per program, or one chunk if that is longer.
        vocabulary_tile: logits per program.
        linear_rows: most rows that ``linear`` does not leave to PyTorch, a power of 2.
        linear_outputs: outputs of ``linear`` per program; neither has been measured.
    """

    attention_tile_bytes: int = 16384
    attention_stages: int = 3
    programs_per_multiprocessor: int = 2
    cache_write_heads: int = 16
    compaction_rows: int = 32
    chunk_scores_tokens: int = 64
    vocabulary_tile: int = 4096
    linear_rows: int = 64
    linear_outputs: int = 16


#: By compute capability, of what has been measured.
SETTINGS = {(9, 0): LaunchSettings()}
DEFAULT = LaunchSettings(attention_tile_bytes=8192, attention_stages=2)


@cache
def settings_of(device: torch.device) -> LaunchSettings:
    if device.type != "cuda":
        return DEFAULT
    return SETTINGS.get(torch.cuda.get_device_capability(device), DEFAULT)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_rows(dim_block: int, element_bytes: int, device: torch.device) -> int:
    """Rows of ``dim_block`` numbers that a program of attention holds at a time."""
    # Tensor cores do not multiply float32: threads keep operands in registers instead.
    row_bytes = dim_block * element_bytes * (2 if element_bytes == 4 else 1)
    return settings_of(device).attention_tile_bytes // row_bytes


def warps(dim_block: int, element_bytes: int) -> int:
    """Warps of a program for rows of ``dim_block`` numbers: more where they spill."""
    return 8 if element_bytes >= 4 or dim_block * element_bytes >= 512 else 4


def attention_splits(programs: int, tiles: int, device: torch.device) -> int:
    """In how many parts to read each KV head, given programs if read in one.

    Args:
        programs: of the launch without splits.
        tiles: that one KV head of one request may hold at most.
    """
    wanted = settings_of(device).programs_per_multiprocessor * multiprocessors(device)
    return max(1, min(-(-wanted // programs), tiles, MAX_SPLITS))
