import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from budgetdraft_kernels.reference import (
    paged_cache_write,
    paged_sparse_attention,
    rotate,
)

#: Rounding of a few hundred terms; float64 shows that nothing else differs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def naive_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query token [H, D] over keys and values [T, G, D], head by head."""
    num_heads, head_dim = queries.shape
    group = num_heads // keys.shape[1]
    out = torch.empty_like(queries)
    for head in range(num_heads):
        logits = keys[:, head // group] @ queries[head] / head_dim**0.5
        out[head] = logits.softmax(0) @ values[:, head // group]
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("width", [1, 2])
def test_paged_attention_equals_dense_attention_of_each_request(
    dtype, page_size, head_dim, group, width
):
    torch.manual_seed(0)
    kv_heads, pages_each = 2, 6
    last = torch.tensor([2, page_size, page_size + 1, 5 * page_size - 3, 6 * page_size])
    lengths = last[:, None] - torch.arange(width).flip(0)
    num_requests = len(last)
    num_pages = num_requests * pages_each + 3
    table = torch.randperm(num_pages)[: num_requests * pages_each].view(
        num_requests, pages_each
    )
    # Whatever lies beyond a request's length is large, but finite as the pool's is.
    key_pages, value_pages = torch.full(
        (2, num_pages, page_size, kv_heads, head_dim), 1e4, dtype=dtype
    )
    queries = torch.randn(num_requests, width, group * kv_heads, head_dim, dtype=dtype)
    contexts = []
    for request, length in enumerate(last):
        keys, values = torch.randn(2, int(length), kv_heads, head_dim, dtype=dtype)
        for index in range(int(length)):
            page, offset = table[request, index // page_size], index % page_size
            key_pages[page, offset] = keys[index]
            value_pages[page, offset] = values[index]
        contexts.append((keys, values))

    out = paged_sparse_attention(queries, key_pages, value_pages, table, lengths)

    for request, (keys, values) in enumerate(contexts):
        for token in range(width):
            seen = int(lengths[request, token])
            expected = naive_attention(
                queries[request, token], keys[:seen], values[:seen]
            )
            torch.testing.assert_close(
                out[request, token], expected, rtol=0, atol=TOLERANCE[dtype]
            )


def test_paged_cache_write_fills_the_named_cells_and_no_other():
    torch.manual_seed(0)
    key_pages, value_pages = torch.zeros(2, 5, 8, 3, 10)
    keys, values = torch.randn(2, 2, 2, 3, 10)
    cells = torch.tensor([7, 8, 39, 16])  # by request, then by token

    paged_cache_write(keys, values, key_pages, value_pages, cells)

    for pages, written in ((key_pages, keys), (value_pages, values)):
        assert torch.equal(pages[0, 7], written[0, 0])
        assert torch.equal(pages[1, 0], written[0, 1])
        assert torch.equal(pages[4, 7], written[1, 0])
        assert torch.equal(pages[2, 0], written[1, 1])
        assert int(pages.any(-1).any(-1).sum()) == 4


@pytest.mark.parametrize("head_dim", [32, 64, 80])
def test_rotate_turns_queries_and_keys_as_transformers_does(head_dim):
    torch.manual_seed(0)
    batch, tokens, heads, kv_heads = 2, 5, 6, 2
    queries = torch.randn(batch, tokens, heads, head_dim, dtype=torch.float64)
    keys = torch.randn(batch, tokens, kv_heads, head_dim, dtype=torch.float64)
    half = torch.randn(batch, tokens, head_dim // 2, dtype=torch.float64)
    angles = torch.cat([half, half], -1)
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(
        queries.transpose(1, 2), keys.transpose(1, 2), cos, sin
    )

    # Ours takes the sine with its first half negated.
    signed = torch.cat([-half.sin(), half.sin()], -1)
    for ours, theirs in zip((queries, keys), expected, strict=True):
        rotated = rotate(ours, cos[:, :, None], signed[:, :, None])
        torch.testing.assert_close(rotated, theirs.transpose(1, 2), rtol=0, atol=1e-14)
