"""What an eviction policy is: a choice of positions, blind to pages and models."""

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings


class EvictionPolicy(Protocol):
    """Chooses the prompt positions that the draft cache keeps.

    The choice is made per leading index of ``keys`` (layer, sequence, KV head), and
    is the same code in training and serving. How many positions are kept depends on
    ``num_tokens`` and ``budget`` alone, so that every layer and head keeps as many.
    """

    #: Queries per KV-head group that ``select`` reads: the last ones of the prompt.
    observation_tokens: int

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        """
        Args:
            operations: ``budgetdraft_kernels.reference``, or ``fused`` on a GPU.
        """
        ...

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        """Positions to keep, ascending and without repeats.

        Where a prompt is read streaming, this is asked after every chunk, about what
        was kept before and the chunk.

        Args:
            keys: [..., num_tokens, head_dim], rotated as the drafter stores them.
            queries: [..., num_queries, head_dim], the queries of the last
                ``observation_tokens`` tokens of every query head that shares the KV
                head; None when ``observation_tokens`` is 0.
            budget: most positions to keep, in tokens.

        Returns:
            [..., num_kept] int64, with ``num_kept <= min(budget, num_tokens)``.
        """
        ...

    def protected_tokens(self, budget: int) -> int:
        """First tokens of the cache that a growing generation never pushes out."""
        ...


def all_positions(keys: Tensor) -> Tensor:
    """Every position of ``keys`` [..., num_tokens, head_dim]: [..., num_tokens]."""
    positions = torch.arange(keys.shape[-2], device=keys.device)
    return positions.expand(keys.shape[:-1])


def take_positions(states: Tensor, kept: Tensor) -> Tensor:
    """Rows ``kept`` [..., num_kept] of keys or values [..., num_tokens, head_dim]."""
    return states.gather(-2, kept[..., None].expand(*kept.shape, states.shape[-1]))


def four_dimensions(states: Tensor) -> Tensor:
    """[..., num_tokens, head_dim] as the operations take them.

    Serving's [num_layers, num_kv_heads, num_tokens, head_dim] are left as they are.
    """
    return states if states.ndim == 4 else states.reshape(1, -1, *states.shape[-2:])
