"""Attention over a whole prompt, chunk by chunk, through one shared scratch buffer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Query rows per masked attention call.
MASKED_ROWS = 256


class PromptAttention:
    """The ``attend`` of a drafter that reads a prompt with full attention.

    The prompt's keys and values stay in a scratch buffer until the policy has chosen;
    one prompt is read at a time. The last layer's attention is never computed: at the
    end of a prompt only keys and values have readers.

    Attributes:
        keys, values: [num_layers, max_tokens, num_kv_heads, head_dim].
        num_tokens: prompt tokens read so far.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        max_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        observation_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            observation_tokens: last tokens of the prompt whose queries are kept.
        """
        shape = (num_layers, max_tokens, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.num_tokens = 0
        self._observation_tokens = observation_tokens
        self._queries: list[Tensor | None] = [None] * num_layers

    def restart(self) -> None:
        self.num_tokens = 0
        self._queries = [None] * len(self._queries)

    def advance(self, num_tokens: int) -> None:
        """Counts a chunk as read, after every layer has seen it."""
        self.num_tokens += num_tokens

    def __call__(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor | None:
        """A chunk in one layer: queries [1, T, H, D], keys and values [1, T, G, D]."""
        start, chunk = self.num_tokens, keys.shape[1]
        end = start + chunk
        self.keys[layer, start:end] = keys[0]
        self.values[layer, start:end] = values[0]
        if self._observation_tokens:
            self._observe(layer, queries)
        if layer == len(self._queries) - 1:
            return None
        if start == 0:
            return self._attend(layer, queries, end, is_causal=True)
        # Later chunks need a mask of their own shape: in blocks of rows it stays small.
        blocks, last = [], start
        for block in queries.split(MASKED_ROWS, dim=1):
            first, last = last, last + block.shape[1]
            shape = (last - first, last)
            mask = torch.ones(shape, dtype=torch.bool, device=keys.device).tril(first)
            blocks.append(self._attend(layer, block, last, attn_mask=mask))
        return torch.cat(blocks, dim=1)

    def _attend(self, layer: int, queries: Tensor, end: int, **mask: Any) -> Tensor:
        """Attention of [1, T, H, D] over the first ``end`` tokens of the prompt."""
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            self.keys[layer, None, :end].transpose(1, 2),
            self.values[layer, None, :end].transpose(1, 2),
            enable_gqa=True,
            **mask,
        )
        return attended.transpose(1, 2)

    def last_queries(self) -> Tensor | None:
        """[num_layers, G, H / G * observation_tokens, D], or None if none are kept."""
        if not self._observation_tokens:
            return None
        queries = torch.stack([q for q in self._queries if q is not None])
        num_kv_heads = self.keys.shape[2]
        grouped = queries.unflatten(2, (num_kv_heads, -1))  # [layers, W, G, H / G, D]
        return grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _observe(self, layer: int, queries: Tensor) -> None:
        previous = self._queries[layer]
        seen = queries[0] if previous is None else torch.cat([previous, queries[0]])
        self._queries[layer] = seen[-self._observation_tokens :]
