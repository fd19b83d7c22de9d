"""One pass of a target of ``transformers`` over new tokens and mask tokens.

Letters in shapes: B sequences, S cells of the cache, T new tokens, A groups of mask
tokens, H query heads, G KV heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from budgetdraft_kernels.reference import rotate
from vllm_budgetdraft.flexdraft.modeling import Attend, FlexDraft, TargetParts


@dataclass
class ContextCache:
    """The target's keys and values of a batch.

    Attributes:
        keys, values: [layers, B, G, S, D], keys rotated.
        lengths: [B] int64, tokens of each sequence; what lies beyond is of no account.
        hidden_cells: [mask layers, B, G, S] bool, what mask tokens do not see.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    hidden_cells: Tensor

    def row(self, index: int) -> "ContextCache":
        """One sequence; writes go through."""
        rows = slice(index, index + 1)
        return ContextCache(
            self.keys[:, rows],
            self.values[:, rows],
            self.lengths[rows],
            self.hidden_cells[:, rows],
        )


class TargetPass:
    """A target and its mask tokens, over a cache that rows fill at different rates.

    Attributes:
        parts: of the target, those that mask tokens use.
        split: the first layer that mask tokens go through.
    """

    def __init__(
        self, target: PreTrainedModel, drafter: FlexDraft, num_drafts: int
    ) -> None:
        self._target, self._drafter = target, drafter
        self._layers = list(target.model.layers)
        self._num_drafts = num_drafts
        self.parts = TargetParts(target, drafter.num_layers)
        self.split = len(self._layers) - drafter.num_layers

    def new_cache(self, batch_size: int, num_cells: int) -> ContextCache:
        """Room for ``num_cells`` tokens of each sequence."""
        drafter, device = self._drafter, self._target.device
        head_dim = drafter.rotary_table.shape[-1]
        sizes = (batch_size, drafter.num_kv_heads, num_cells)
        shape = (len(self._layers), *sizes, head_dim)
        new: dict[str, Any] = {"dtype": self._target.dtype, "device": device}
        return ContextCache(
            torch.zeros(shape, **new),
            torch.zeros(shape, **new),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.zeros(drafter.num_layers, *sizes, dtype=torch.bool, device=device),
        )

    def __call__(
        self,
        cache: ContextCache,
        tokens: Tensor,
        starts: Tensor | None = None,
        bonus: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The target over new tokens, whose states go into the cache, and mask tokens.

        Args:
            tokens: [B, T], the next ones of each sequence; ``lengths`` stay as they
                are.
            starts: [B, A], positions of the bonus tokens of groups of mask tokens;
                these see what is before them in the cache. None for no masks.
            bonus: [B, A, hidden_size], embeddings of the bonus tokens.

        Returns:
            Normed hidden states, [B, T, hidden_size] and [B, A, k + 1, hidden_size].
        """
        drafter, (batch, num_tokens) = self._drafter, tokens.shape
        device, lengths = tokens.device, cache.lengths
        positions = lengths[:, None] + torch.arange(num_tokens, device=device)
        rotary = [x[:, :, None] for x in drafter.rotary(positions)]
        cells = torch.arange(int(lengths.max()) + num_tokens, device=device)
        causal = (cells <= positions[..., None])[:, None]  # [B, 1, T, num_cells]
        rows = torch.arange(batch, device=device)[:, None]
        x = self.parts.embed(tokens)
        masks, attend_masks = x[:, :0], None
        if starts is not None and bonus is not None:
            masks = drafter.masks(bonus, self._num_drafts + 1).flatten(1, 2)
            attend_masks = self._mask_attention(cache, starts, len(cells))
        num_masks = masks.shape[1]
        for index, layer in enumerate(self._layers):
            attention, depth = layer.self_attn, index - self.split
            if num_tokens:
                q, k, v = _heads(attention, layer.input_layernorm(x))
                cache.keys[index, rows, :, positions] = rotate(k, *rotary)
                cache.values[index, rows, :, positions] = v
                attended = _attend(
                    rotate(q, *rotary),
                    cache.keys[index, :, :, : len(cells)],
                    cache.values[index, :, :, : len(cells)],
                    causal,
                )
                x = x + attention.o_proj(attended.flatten(2))
            if depth < 0:
                if num_tokens:
                    x = x + layer.mlp(layer.post_attention_layernorm(x))
                continue
            if attend_masks is not None:
                masks = drafter.attended(depth, masks, layer, attend_masks)
            # One product for both, so that the weights are read once.
            both = torch.cat([x, masks], 1)
            both = both + layer.mlp(layer.post_attention_layernorm(both))
            x, masks = both.split((num_tokens, num_masks), 1)
        masks = self.parts.norm(masks)
        return self.parts.norm(x), masks.unflatten(1, (-1, self._num_drafts + 1))

    def _mask_attention(
        self, cache: ContextCache, starts: Tensor, num_cells: int
    ) -> Attend:
        """Of mask tokens to what is before their bonus token, and to their group.

        Args:
            starts: see ``__call__``.
            num_cells: of the cache, that are in use.
        """
        drafter, (batch, groups), device = self._drafter, starts.shape, starts.device
        block = self._num_drafts + 1
        places = (starts[..., None] + torch.arange(block, device=device)).flatten(1)
        rotary = [x[:, :, None] for x in drafter.rotary(places)]
        cells = torch.arange(num_cells, device=device)
        before = (cells < starts.repeat_interleave(block, 1)[..., None])[:, None]
        of_group = torch.arange(groups, device=device).repeat_interleave(block)
        own = of_group == of_group[:, None]
        own = own.expand(batch, drafter.num_heads, -1, -1)
        sizes = (drafter.num_heads, *[drafter.num_kv_heads] * 2)

        def attend(depth: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.split(sizes, 2)
            own_keys, own_values = rotate(k, *rotary).transpose(1, 2), v.transpose(1, 2)
            shown = ~cache.hidden_cells[depth, :, :, None, :num_cells]
            shown = shown.repeat_interleave(q.shape[2] // k.shape[2], 1)
            layer = self.split + depth
            return _attend(
                rotate(q, *rotary),
                torch.cat([cache.keys[layer, :, :, :num_cells], own_keys], 2),
                torch.cat([cache.values[layer, :, :, :num_cells], own_values], 2),
                torch.cat([before & shown, own], -1),
            )

        return attend


def _heads(attention: Any, h: Tensor) -> list[Tensor]:
    """Query, key and value heads of one of the target's layers, [B, T, heads, D]."""
    q, k, v = (
        projection(h).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return [q, k, v]


def _attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """[B, T, H, D] over [B, G, cells, D]; returns [B, T, H, D]."""
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=visible, enable_gqa=True
    )
    return attended.transpose(1, 2)
