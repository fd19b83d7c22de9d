"""The views of one context that a drafter trains on: its full cache and sparse ones.

Letters in shapes: V views, B sequences, T tokens, H query heads, G KV heads, D head
size, P prefix tokens, C continuation tokens, n tokens kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetdraft_kernels.reference import accumulated_attention, rotate
from budgetdraft_kernels.reference_projections import Norms, normed_heads
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.modeling import Attend, Drafter
from vllm_budgetdraft.eviction.base import (
    EvictionPolicy,
    PromptStates,
    check_selection,
    take_positions,
)
from vllm_budgetdraft.eviction.reading import ReadingPlan

#: Reads tokens [B, T], or what stands for them, as a drafter does.
Read = Callable[[Tensor, Attend], Any]


@dataclass(frozen=True)
class View:
    """What a continuation sees of its prefix.

    Attributes:
        keys, values: by layer, [B, G, n, D] each, as attention reads them.
        first_position: of the continuation.
    """

    keys: list[Tensor]
    values: list[Tensor]
    first_position: int

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0


class PrefixStates:
    """A drafter's states of prefixes of equal length, read chunk by chunk.

    What ``PromptReader`` and its buffer are in serving, for a batch, and with gradients
    if they are wanted. Gradients never flow through the choice of what is kept.
    """

    def __init__(
        self,
        drafter: Drafter,
        policy: EvictionPolicy,
        *,
        is_relative: bool,
        read: Read | None = None,
    ) -> None:
        """
        Args:
            is_relative: whether positions are indices in the cache, and keys are
                stored as they are and rotated when read.
            read: what is done with tokens; the drafter itself by default.
        """
        self._drafter, self._policy = drafter, policy
        self._read = read or drafter
        self._is_relative = is_relative
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._queries: list[Tensor] = []
        self._received: list[Tensor] = []
        self._num_seen = 0

    @property
    def num_held(self) -> int:
        return self._keys[0].shape[2] if self._keys else 0

    def read(self, tokens: Tensor) -> None:
        """The next tokens of each prefix, [B, T]."""
        drafter, policy, held = self._drafter, self._policy, self.num_held
        length = tokens.shape[1]
        start = held if self._is_relative else self._num_seen
        positions = torch.arange(start, start + length, device=tokens.device)
        rotary = drafter.rotary(positions)
        self._num_seen += length
        mask = None
        if held:
            mask = torch.ones(length, held + length, dtype=torch.bool)
            mask = mask.tril(held).to(tokens.device)

        def attend(layer: int, qkv: Tensor, norms: Norms) -> Tensor | None:
            qkv = normed_heads(qkv, drafter.num_kv_heads, norms)
            sizes = (drafter.num_heads, drafter.num_kv_heads, drafter.num_kv_heads)
            unrotated, keys, values = qkv.transpose(1, 2).split(sizes, 1)
            queries = rotate(unrotated, *rotary)
            stored = unrotated if self._is_relative else queries
            keys = keys if self._is_relative else rotate(keys, *rotary)
            keys = extend(self._keys, layer, keys)
            values = extend(self._values, layer, values)
            if window := policy.observation_tokens:
                last = extend(self._queries, layer, stored)[:, :, -window:]
                self._queries[layer] = last
            is_last = layer == drafter.num_layers - 1
            if is_last and not policy.accumulates_attention:
                return None
            keys = self._as_read(keys)
            if policy.accumulates_attention:
                self._count(layer, queries, keys)
            if is_last:
                return None
            attended = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
            return attended.transpose(1, 2)

        self._read(tokens, attend)

    def skip_to(self, position: int) -> None:
        """What of each prefix comes before is never read, if it has not been."""
        self._num_seen = position

    def kept(self, budget: int) -> "PrefixStates":
        """What the policy keeps, chosen per layer, sequence and head as in serving.

        Raises:
            ValueError: the policy's choice is none.
        """
        other = PrefixStates(
            self._drafter,
            self._policy,
            is_relative=self._is_relative,
            read=self._read,
        )
        other._num_seen, other._queries = self._num_seen, list(self._queries)
        for layer, (keys, values) in enumerate(
            zip(self._keys, self._values, strict=True)
        ):
            received = self._received[layer] if self._received else None
            states = PromptStates(
                self._as_read(keys).detach(), self._last_queries(layer), received
            )
            kept = self._policy.select(states, budget)
            check_selection(kept, states, budget)
            other._keys.append(take_positions(keys, kept))
            other._values.append(take_positions(values, kept))
            if received is not None:
                other._received.append(received.gather(-1, kept))
        return other

    def view(self) -> View:
        return View(
            [self._as_read(keys) for keys in self._keys],
            self._values,
            self.num_held if self._is_relative else self._num_seen,
        )

    def _last_queries(self, layer: int) -> Tensor | None:
        """[B, G, H / G, observation_tokens or less, D]"""
        if not self._queries:
            return None
        queries = self._queries[layer].detach()[:, :, -self.num_held :]
        queries = self._as_read(queries, start=self.num_held - queries.shape[2])
        grouped: Tensor = queries.unflatten(1, (self._drafter.num_kv_heads, -1))
        return grouped

    def _count(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        pairs = zip(
            queries.detach().transpose(1, 2), keys.detach().transpose(1, 2), strict=True
        )
        received = torch.stack([accumulated_attention(q, k) for q, k in pairs])
        if layer < len(self._received):
            before = self._received[layer]
            received[..., : before.shape[-1]] += before
            self._received[layer] = received
        else:
            self._received.append(received)

    def _as_read(self, states: Tensor, start: int = 0) -> Tensor:
        """Rotates [B, heads, T, D], if stored as they are, from index ``start`` on."""
        if not self._is_relative:
            return states
        indices = torch.arange(start, start + states.shape[2], device=states.device)
        return rotate(states, *self._drafter.rotary(indices))


class PrefixViews:
    """The views of one prefix: the full one, and those of budgets."""

    def __init__(
        self,
        drafter: Drafter,
        policy: EvictionPolicy,
        prefix: Tensor,
        view: ViewSettings,
        *,
        continuation_tokens: int,
        read: Read | None = None,
    ) -> None:
        """
        Args:
            prefix: [B, P] int64.
            continuation_tokens: C.
            read: see ``PrefixStates``.
        """
        self._read = read
        self._drafter, self._policy, self._prefix = drafter, policy, prefix
        self._view = view
        self._is_relative = view.position_mode == "cache_relative"
        self._native_tokens = drafter.config.max_position_embeddings
        self._room = self._native_tokens - continuation_tokens
        self._whole: PrefixStates | None = None
        if not self._is_relative or prefix.shape[1] <= self._room:
            self._whole = self._empty()
            for chunk in prefix.split(view.draft_prefill_chunk, 1):
                if chunk.shape[1]:  # there may be no prefix
                    self._whole.read(chunk)

    def full(self) -> View:
        """All of the prefix, or as much as the native range has positions for."""
        return self._whole.view() if self._whole else self.sparse(self._room)

    def sparse(self, budget: int) -> View:
        """What serving keeps of the prefix, and how it is read there."""
        length = self._prefix.shape[1]
        plan = ReadingPlan.of(
            self._view,
            self._policy,
            native_tokens=self._native_tokens,
            num_tokens=length,
            budget=budget,
        )
        if plan.first_tokens is None:
            assert self._whole is not None, (length, self._room)
            keeps_all = self._view.eviction_policy == "keep_all"  # whatever the budget
            return (self._whole if keeps_all else self._whole.kept(budget)).view()
        states = self._empty()
        for piece in plan.pieces(length):
            states.skip_to(piece.start)
            states.read(self._prefix[:, piece.start : piece.stop])
            states = states.kept(budget)
        return states.view()

    def _empty(self) -> PrefixStates:
        return PrefixStates(
            self._drafter,
            self._policy,
            is_relative=self._is_relative,
            read=self._read,
        )


class ViewAttention:
    """Attention of continuations to a view of their prefix each, and to their own.

    All views go through the drafter together, as one batch of V * B.
    """

    def __init__(
        self, drafter: Drafter, views: list[View], batch: int, length: int
    ) -> None:
        """
        Args:
            batch: B.
            length: C.
        """
        self._views, self._batch = views, batch
        self._sizes = (drafter.num_heads, drafter.num_kv_heads, drafter.num_kv_heads)
        offsets = torch.arange(length, device=drafter.rotary_table.device)
        positions = torch.stack([view.first_position + offsets for view in views])
        cos, sin = drafter.rotary(positions)
        self._rotary = cos[:, None, None], sin[:, None, None]  # [V, 1, 1, C, D]

    def heads(self, qkv: Tensor, norms: Norms) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [V, B, heads, C, D], rotated, of [V * B, C, ...]"""
        qkv = normed_heads(qkv, self._sizes[1], norms)
        heads_first = qkv.unflatten(0, (len(self._views), self._batch)).transpose(2, 3)
        queries, keys, values = heads_first.split(self._sizes, 2)
        return rotate(queries, *self._rotary), rotate(keys, *self._rotary), values

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        """[V * B, C, H, D].

        Args:
            keys, values: the continuations' own, [V, B, G, m, D].
            mask: [C, m] bool, which of these a query sees; of its prefix, all.
        """
        attended = []
        for index, view in enumerate(self._views):
            own_keys, own_values = keys[index], values[index]
            if view.num_tokens:
                own_keys = torch.cat([view.keys[layer].to(own_keys.dtype), own_keys], 2)
                own_values = torch.cat(
                    [view.values[layer].to(own_values.dtype), own_values], 2
                )
            attended.append(
                F.scaled_dot_product_attention(
                    queries[index],
                    own_keys,
                    own_values,
                    attn_mask=F.pad(mask, (view.num_tokens, 0), value=True),
                    enable_gqa=True,
                )
            )
        return torch.stack(attended).transpose(2, 3).flatten(0, 1)


def continuation_hidden(
    drafter: Drafter,
    tokens: Tensor,
    views: list[View],
    *,
    checkpoints: bool = False,
) -> Tensor:
    """Hidden states of continuations that see a view of their prefix and themselves.

    Args:
        tokens: [B, C] int64.
        checkpoints: whether activations are computed again for the gradients.

    Returns:
        [V, B, C, hidden_size].
    """
    batch, length = tokens.shape
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    attention = ViewAttention(drafter, views, batch, length)

    def attend(layer: int, qkv: Tensor, norms: Norms) -> Tensor:
        return attention.attend(layer, *attention.heads(qkv, norms), mask)

    hidden = drafter(tokens.repeat(len(views), 1), attend, checkpoints=checkpoints)
    by_view: Tensor = hidden.unflatten(0, (len(views), batch))
    return by_view


def extend(layers: list[Tensor], layer: int, states: Tensor) -> Tensor:
    """What a layer has of [..., heads, T, D], with what comes after it."""
    if layer < len(layers):
        layers[layer] = torch.cat([layers[layer], states], -2)
    else:
        layers.append(states)
    return layers[layer]
