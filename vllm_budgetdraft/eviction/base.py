"""What an eviction policy is: a choice of positions, blind to pages and models."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings


@dataclass(frozen=True)
class PromptStates:
    """What a policy sees of a prompt, or of several that hold as many tokens.

    All layers at once, or one, or one head.

    Attributes:
        keys: [..., num_tokens, head_dim], rotated as attention reads them.
        queries: [..., heads, num_queries, head_dim], the queries of the last
            ``observation_tokens`` tokens, or as many as there are, of every query head
            that shares the KV head; None when ``observation_tokens`` is 0.
        received: [..., num_tokens] float32, the attention that each key has received,
            summed over every query so far that shares the KV head; None unless the
            policy ``accumulates_attention``.
    """

    keys: Tensor
    queries: Tensor | None = None
    received: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[-2]

    def positions(self, start: int, end: int) -> Tensor:
        """``start`` to ``end`` for each leading index: [..., end - start] int64."""
        positions = torch.arange(start, end, device=self.keys.device)
        return positions.expand(*self.keys.shape[:-2], -1)

    def all_positions(self) -> Tensor:
        return self.positions(0, self.num_tokens)


class EvictionPolicy(ABC):
    """Chooses the prompt positions that the draft cache keeps.

    The choice is made per leading index of the keys (layer, sequence, KV head), and is
    the same code in training and serving. How many positions are kept depends on the
    number of tokens and the budget alone, so that every layer and head keeps as many.

    When generation has filled the recent window, whole pages after the
    ``protected_tokens`` make room: the oldest, or, if the policy
    ``accumulates_attention``, those with the least of it in the older half.
    """

    #: Last tokens of the prompt whose queries ``select`` reads.
    observation_tokens = 0
    #: Whether ``select`` reads ``received``, which then is kept up in generation too.
    accumulates_attention = False

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        """
        Args:
            operations: ``budgetdraft_kernels.reference``, or ``fused`` on a GPU.
        """
        self.settings = settings
        self.operations = operations

    @abstractmethod
    def select(self, states: PromptStates, budget: int) -> Tensor:
        """Positions to keep, ascending and without repeats.

        Where a prompt is read streaming, this is asked after every chunk, about what
        was kept before and the chunk.

        Args:
            budget: most positions to keep, in tokens.

        Returns:
            [..., num_kept] int64, with ``num_kept <= min(budget, num_tokens)``.
        """

    def protected_tokens(self, budget: int) -> int:
        """First tokens of the cache that a growing generation never pushes out."""
        return budget

    def unread(self, num_tokens: int, budget: int) -> range:
        """Positions of a prompt that streaming need not read, for none is kept."""
        return range(0)


class RankingPolicy(EvictionPolicy):
    """Keeps the sinks, the most recent positions, and the best-scored ones between.

    The first ``sink_tokens`` are the sinks.
    """

    @abstractmethod
    def num_recent(self, room: int) -> int:
        """How many of the last positions always stay.

        Args:
            room: what the sinks leave of the budget.
        """

    @abstractmethod
    def scores(self, states: PromptStates, end: int) -> Tensor:
        """Of the positions below ``end``, [..., end]."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        num_tokens, sinks = states.num_tokens, self.settings.sink_tokens
        if num_tokens <= budget:
            return states.all_positions()
        recent = self.num_recent(budget - sinks)
        end = num_tokens - recent
        scores = self.scores(states, end)[..., sinks:]
        best = scores.topk(budget - sinks - recent, dim=-1, sorted=False).indices
        chosen = sinks + best.sort(-1).values
        first, last = states.positions(0, sinks), states.positions(end, num_tokens)
        return torch.cat([first, chosen, last], dim=-1)


def check_selection(
    kept: Tensor, states: PromptStates, budget: int, *, values: bool = True
) -> None:
    """Raises ValueError for what ``EvictionPolicy.select`` must not return.

    Args:
        values: whether to look at positions, and not at their shape alone, which waits
            for the device.
    """
    limit = min(budget, states.num_tokens)
    leading = states.keys.shape[:-2]
    if kept.dtype != torch.int64 or kept.shape[:-1] != leading:
        raise ValueError(
            f"the eviction policy selected {kept.dtype} {tuple(kept.shape)}; it must "
            f"be int64 {(*leading, 'num_kept')}"
        )
    if not 1 <= kept.shape[-1] <= limit:
        raise ValueError(
            f"the eviction policy kept {kept.shape[-1]} positions; it must keep 1 to "
            f"{limit}, for the budget is {budget} of {states.num_tokens} tokens"
        )
    if not values:
        return
    ascend = (kept.diff() > 0).all()
    inside = (kept[..., 0] >= 0).all() & (kept[..., -1] < states.num_tokens).all()
    if not bool(ascend & inside):
        raise ValueError(
            "the eviction policy kept positions that do not ascend from 0 to below "
            f"{states.num_tokens}; sort them, without repeats"
        )


def take_positions(states: Tensor, kept: Tensor) -> Tensor:
    """Rows ``kept`` [..., num_kept] of keys or values [..., num_tokens, head_dim]."""
    return states.gather(-2, kept[..., None].expand(*kept.shape, states.shape[-1]))


def chunk_scores(
    operations: ModuleType,
    keys: Tensor,
    queries: Tensor,
    chunk_size: int,
    score: Literal["mean_key", "attention"],
) -> Tensor:
    """``reference.chunk_scores`` of a policy's states, [..., num_chunks].

    Args:
        operations: see ``EvictionPolicy``.
        keys, queries: as ``PromptStates`` has them.
    """
    if keys.ndim == 4:  # serving's, of one prompt
        scores: Tensor = operations.chunk_scores(keys, queries, chunk_size, score)
        return scores
    leading = keys.shape[:-2]
    # Kernels are compiled for the number of heads, which no number of prompts changes.
    num_heads = keys.shape[-3] if leading else 1
    keys = keys.reshape(-1, num_heads, *keys.shape[-2:])
    queries = queries.reshape(-1, num_heads, *queries.shape[-3:])
    scores = operations.chunk_scores(keys, queries, chunk_size, score)
    return scores.view(*leading, scores.shape[-1])
