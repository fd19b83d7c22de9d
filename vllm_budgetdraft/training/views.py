"""The views of one context that a drafter trains on: its full cache and sparse ones.

Letters in shapes: B sequences, T tokens, H query heads, G KV heads, D head size,
P prefix tokens, C continuation tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetdraft_kernels.reference import accumulated_attention, split_rotated
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.base import (
    EvictionPolicy,
    PromptStates,
    take_positions,
)


@dataclass
class PrefixCache:
    """Keys and values that the drafter computed for a prefix, by layer.

    Attributes:
        keys, values: [B, G, P, D] each.
        queries: [B, G, H / G * observation_tokens, D] each, or empty.
        attention: [B, G, P] each, what each key received; or empty.
    """

    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    attention: list[Tensor]

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def sparse(self, policy: EvictionPolicy, budget: int) -> "PrefixCache":
        """What ``policy`` keeps, per layer, sequence and head, as serving keeps it."""
        view = PrefixCache([], [], [], [])
        for layer, keys in enumerate(self.keys):
            queries = self.queries[layer] if self.queries else None
            attention = self.attention[layer] if self.attention else None
            kept = policy.select(PromptStates(keys, queries, attention), budget)
            view.keys.append(take_positions(keys, kept))
            view.values.append(take_positions(self.values[layer], kept))
        return view


@torch.no_grad()
def read_prefix(
    drafter: Drafter, tokens: Tensor, policy: EvictionPolicy
) -> PrefixCache:
    """Runs the drafter over prefixes [B, P] with full attention, without gradients.

    Args:
        policy: what its choice goes by is kept.
    """
    cache = PrefixCache([], [], [], [])
    if not tokens.shape[1]:
        return cache

    positions = torch.arange(tokens.shape[1], device=tokens.device)
    rotary = drafter.rotary(positions)

    def attend(layer: int, qkv: Tensor) -> Tensor | None:
        states = split_rotated(qkv, *rotary, drafter.num_kv_heads)
        queries, keys, values = (x.transpose(1, 2) for x in states)
        cache.keys.append(keys)
        cache.values.append(values)
        if policy.observation_tokens:
            last = queries[:, :, -policy.observation_tokens :]
            cache.queries.append(last.unflatten(1, (keys.shape[1], -1)).flatten(2, 3))
        if policy.accumulates_attention:
            sequences = zip(states[0], states[1], strict=True)
            cache.attention.append(
                torch.stack([accumulated_attention(q, k) for q, k in sequences])
            )
        if layer == drafter.num_layers - 1:
            return None
        attended = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
        return attended.transpose(1, 2)

    drafter(tokens, attend)
    return cache


def continuation_hidden(
    drafter: Drafter, tokens: Tensor, first_position: int, prefix: PrefixCache
) -> Tensor:
    """Hidden states of continuations that see a cached prefix and themselves.

    Args:
        tokens: [B, C] int64.
        first_position: true position of the first of them, whatever ``prefix`` kept.

    Returns:
        [B, C, hidden_size]; gradients flow through the continuation only.
    """
    length = tokens.shape[1]
    kept = prefix.num_tokens
    mask = None
    if kept:
        mask = torch.ones(length, kept + length, dtype=torch.bool, device=tokens.device)
        mask = mask.tril(kept)

    positions = first_position + torch.arange(length, device=tokens.device)
    rotary = drafter.rotary(positions)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        states = split_rotated(qkv, *rotary, drafter.num_kv_heads)
        queries, keys, values = (x.transpose(1, 2) for x in states)
        if kept:
            keys = torch.cat([prefix.keys[layer].to(keys.dtype), keys], dim=2)
            values = torch.cat([prefix.values[layer].to(values.dtype), values], dim=2)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return attended.transpose(1, 2)

    return drafter(tokens, attend)
