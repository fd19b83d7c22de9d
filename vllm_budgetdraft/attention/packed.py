"""Causal attention over a packed batch of prompts, each perhaps read in part before.

Letters in shapes: Q query tokens of all prompts, K key tokens of all prompts, H query
heads, G KV heads, D head size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from vllm_budgetdraft.attention.backend import is_gpu

#: ``attend(queries [Q, H, D], keys [K, G, D], values [K, G, D], query_lengths,
#: key_lengths)`` returns [Q, H, D]. Prompts follow each other; the query tokens of one
#: are the last of its key tokens, and each sees the keys up to and with its own.
PackedAttention = Callable[[Tensor, Tensor, Tensor, list[int], list[int]], Tensor]

#: Query rows per call where PyTorch writes the mask out: it stays small.
MASKED_ROWS = 256


def select_packed_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PackedAttention:
    """Chooses xFormers where it runs for a model of these heads, PyTorch otherwise.

    That it is installed says little: its kernels are built for one release of PyTorch,
    and for GPUs.
    """
    if not is_gpu(device):
        return attend_with_torch
    queries = torch.zeros(3, num_heads, head_dim, dtype=dtype, device=device)
    keys = torch.zeros(4, num_kv_heads, head_dim, dtype=dtype, device=device)
    try:
        attend_with_xformers(queries, keys, keys, [2, 1], [2, 2])
    except (ImportError, NotImplementedError):
        return attend_with_torch
    return attend_with_xformers


def attend_with_torch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
) -> Tensor:
    """``PackedAttention`` by PyTorch, prompt by prompt."""
    prompts = zip(
        queries.split(query_lengths),
        keys.split(key_lengths),
        values.split(key_lengths),
        strict=True,
    )
    blocks = [block for prompt in prompts for block in _causal_blocks(*prompt)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _causal_blocks(queries: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
    whole = len(queries) == len(keys) or is_gpu(queries.device)
    rows = max(len(queries), 1) if whole else MASKED_ROWS
    blocks, last = [], len(keys) - len(queries)
    for block in queries.split(rows):
        last += len(block)
        attended = F.scaled_dot_product_attention(
            block.transpose(0, 1)[None],
            keys[:last].transpose(0, 1)[None],
            values[:last].transpose(0, 1)[None],
            attn_mask=causal_lower_right(len(block), last),
            enable_gqa=True,
        )
        blocks.append(attended[0].transpose(0, 1))
    return blocks


def attend_with_xformers(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
) -> Tensor:
    """``PackedAttention`` by xFormers, all prompts in one call.

    Raises:
        ImportError: xFormers is not installed.
        NotImplementedError: it has no kernel for this device, type or head size.
    """
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    mask = BlockDiagonalCausalFromBottomRightMask.from_seqlens(
        query_lengths, key_lengths
    )
    num_kv_heads = keys.shape[1]
    grouped = queries.unflatten(1, (num_kv_heads, -1))[None]  # [1, Q, G, H / G, D]
    shared = (1, -1, -1, grouped.shape[3], -1)
    attended: Tensor = memory_efficient_attention(
        grouped,
        keys[None, :, :, None].expand(shared),
        values[None, :, :, None].expand(shared),
        attn_bias=mask,
    )
    return attended[0].flatten(1, 2)
