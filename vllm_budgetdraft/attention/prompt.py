"""Attention over prompts, piece by piece, through one shared scratch buffer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from types import ModuleType

import torch
from torch import Tensor

from budgetdraft_kernels.reference import rotate
from budgetdraft_kernels.reference_projections import Norms, normed_heads
from vllm_budgetdraft.attention.packed import select_packed_attention
from vllm_budgetdraft.cache.ranges import packed_ranges


@dataclass(eq=False)
class Segment:
    """A prompt's part of the buffer.

    Attributes:
        start: its first cell.
        num_held: tokens in it.
        queries: of its last tokens, [num_layers, W, H, D], as keys are stored.
    """

    start: int = 0
    num_held: int = 0
    queries: Tensor | None = None

    @property
    def cells(self) -> slice:
        return slice(self.start, self.start + self.num_held)


class PromptAttention:
    """The ``attend`` of a drafter that reads prompts.

    Keys and values of each prompt stay in its segment of a scratch buffer until the
    policy has chosen. One pass takes a piece of every prompt that is read, packed one
    after another. The last layer's attention is never computed: at the end of a prompt
    only keys and values have readers.
    """

    def __init__(
        self,
        operations: ModuleType,
        *,
        num_layers: int,
        max_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        observation_tokens: int,
        accumulates_attention: bool,
        key_rotary: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            operations: see ``select_operations``.
            max_tokens: of all segments together.
            observation_tokens: last tokens of a prompt whose queries are kept.
            accumulates_attention: whether to count what each key receives.
            key_rotary: cos and sin of every index of a segment, [longest segment, D] or
                longer, where keys are stored as they are and rotated when read; None
                where they are stored rotated.
        """
        self._operations = operations
        self._attend = select_packed_attention(
            num_heads, num_kv_heads, head_dim, dtype, device
        )
        self._num_layers = num_layers
        shape = (num_layers, max_tokens, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.received: Tensor | None = None
        if accumulates_attention:
            self.received = torch.zeros(
                (num_layers, num_kv_heads, max_tokens), device=device
            )
        self._key_rotary = key_rotary
        self.max_tokens = max_tokens
        self._observation_tokens = observation_tokens
        self._segments: list[Segment] = []

    @property
    def num_bytes(self) -> int:
        received = 0 if self.received is None else self.received.nbytes
        return self.keys.nbytes + self.values.nbytes + received

    def open(self) -> Segment:
        """An empty segment."""
        segment = Segment()
        self._segments.append(segment)
        return segment

    def load(
        self, segment: Segment, keys: Tensor, values: Tensor, received: Tensor | None
    ) -> None:
        """Begins an empty segment with what a cache holds.

        Args:
            keys, values: [num_layers, T, num_kv_heads, head_dim], as they are stored.
            received: [T] float32, of all layers and heads, if that is counted.
        """
        num_tokens = keys.shape[1]
        self._arrange([(segment, num_tokens)])
        segment.num_held = num_tokens
        self.keys[:, segment.cells] = keys
        self.values[:, segment.cells] = values
        if self.received is not None:
            assert received is not None
            shares = self.received.shape[:2].numel()
            self.received[..., segment.cells] = received / shares

    def close(self, segment: Segment) -> None:
        self._segments.remove(segment)

    def extend(
        self, pieces: Sequence[tuple[Segment, int]], cos: Tensor, sin: Tensor
    ) -> "PromptAttention":
        """Makes room for a pass, which is to follow.

        Args:
            pieces: open segments, and how many tokens each gets.
            cos, sin: [T, D], of the positions of these tokens.
        """
        self._arrange(pieces)
        self._rotary = cos, sin
        self._pieces = [segment for segment, _ in pieces]
        self._query_lengths = [length for _, length in pieces]
        cells = []
        for segment, length in pieces:
            segment.num_held += length
            end = segment.start + segment.num_held
            cells.append(range(end - length, end))
        self._key_lengths = [segment.num_held for segment in self._pieces]
        self._num_keys = sum(self._key_lengths)
        self._cells = self._indices(cells)
        if self.received is not None:
            self.received[..., self._cells] = 0
        if self._key_rotary is not None:
            rows = self._indices([range(each) for each in self._key_lengths])
            cos, sin = self._key_rotary
            self._rotary_of_keys = cos[rows, None], sin[rows, None]
        if self._observation_tokens:
            ends = accumulate(self._query_lengths)
            self._last_lengths = [
                min(length, self._observation_tokens) for length in self._query_lengths
            ]
            self._last_rows = self._indices(
                [
                    range(end - length, end)
                    for end, length in zip(ends, self._last_lengths, strict=True)
                ]
            )
            self._last_queries: list[Tensor] = []
        return self

    def _indices(self, runs: list[range]) -> Tensor:
        return packed_ranges(runs, self.keys.device)

    def _arrange(self, pieces: Sequence[tuple[Segment, int]]) -> None:
        """Lays segments in a row: first the ones of this pass, with room to grow."""
        grown = {segment for segment, _ in pieces}
        idle = ((each, 0) for each in self._segments if each not in grown)
        start, old, new = 0, [], []
        for segment, length in chain(pieces, idle):
            if segment.num_held and segment.start != start:
                old.append(range(segment.cells.start, segment.cells.stop))
                new.append(range(start, start + segment.num_held))
            segment.start = start
            start += segment.num_held + length
        assert start <= self.max_tokens, (start, self.max_tokens)
        if old:
            sources, places = self._indices(old), self._indices(new)
            for states in (self.keys, self.values):
                states[:, places] = states[:, sources]
            if self.received is not None:
                self.received[..., places] = self.received[..., sources]

    def keep(self, segment: Segment, kept: Tensor) -> None:
        """Drops all but some rows of a segment.

        Args:
            kept: [num_layers, num_kv_heads, num_kept] int64, ascending.
        """
        num_kept = kept.shape[2]
        if num_kept == segment.num_held:
            return
        held, left = segment.cells, slice(segment.start, segment.start + num_kept)
        index = kept.transpose(1, 2)[..., None].expand(-1, -1, -1, self.keys.shape[3])
        for states in (self.keys, self.values):
            states[:, left] = states[:, held].gather(1, index)
        if self.received is not None:
            self.received[..., left] = self.received[..., held].gather(2, kept)
        segment.num_held = num_kept

    def __call__(self, layer: int, qkv: Tensor, norms: Norms) -> Tensor | None:
        """A pass in one layer, [T, H + 2 * G, D] to [T, H, D]."""
        keys, values = self.keys[layer], self.values[layer]
        qkv = normed_heads(qkv, keys.shape[1], norms)
        queries = self._operations.paged_cache_write(
            qkv,
            *self._rotary,
            keys[None],  # one page, as long as the buffer
            values[None],
            self._cells,
            rotate_keys=self._key_rotary is None,
            validate=False,
        )
        is_last = layer == self._num_layers - 1
        if self._observation_tokens:
            unrotated = qkv[:, : queries.shape[1]]
            seen = queries if self._key_rotary is None else unrotated
            self._last_queries.append(seen[self._last_rows])
            if is_last:
                self._observe()
        if is_last and self.received is None:
            return None
        keys, values = keys[: self._num_keys], values[: self._num_keys]
        if self._key_rotary is not None:
            keys = rotate(keys, *self._rotary_of_keys)
        if self.received is not None:
            self._count(self.received[layer], queries, keys)
        if is_last:
            return None
        lengths = self._query_lengths, self._key_lengths
        return self._attend(queries, keys, values, *lengths)

    def _count(self, received: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Adds to ``received`` [G, max_tokens], prompt by prompt."""
        for segment, of_queries, of_keys in zip(
            self._pieces,
            queries.split(self._query_lengths),
            keys.split(self._key_lengths),
            strict=True,
        ):
            received[:, segment.cells] += self._operations.accumulated_attention(
                of_queries, of_keys, validate=False
            )

    def _observe(self) -> None:
        """Appends to each segment's queries the last ones of this pass."""
        by_piece = torch.stack(self._last_queries).split(self._last_lengths, 1)
        for segment, last in zip(self._pieces, by_piece, strict=True):
            if segment.queries is not None:
                last = torch.cat([segment.queries, last], 1)
            segment.queries = last[:, -self._observation_tokens :]

    def keys_as_read(self, segment: Segment) -> Tensor:
        """[num_layers, num_held, num_kv_heads, head_dim], rotated."""
        return self._as_read(self.keys[:, segment.cells])

    def last_queries(self, segment: Segment) -> Tensor | None:
        """[num_layers, G, H / G, observation_tokens or less, D]; None if not kept."""
        if segment.queries is None:
            return None
        queries = segment.queries[:, -segment.num_held :]
        queries = self._as_read(queries, start=segment.num_held - queries.shape[1])
        num_kv_heads = self.keys.shape[2]
        # [layers, W, G, H / G, D]
        grouped: Tensor = queries.unflatten(2, (num_kv_heads, -1))
        return grouped.permute(0, 2, 3, 1, 4).contiguous()

    def received_by(self, segment: Segment) -> Tensor | None:
        """[num_layers, num_kv_heads, num_held] float32, what each key has received."""
        return None if self.received is None else self.received[..., segment.cells]

    def _as_read(self, states: Tensor, start: int = 0) -> Tensor:
        """Rotates [..., T, heads, D], stored as they are, from index ``start`` on."""
        if self._key_rotary is None:
            return states
        end = start + states.shape[-3]
        cos, sin = (x[start:end, None] for x in self._key_rotary)
        return rotate(states, cos, sin)
