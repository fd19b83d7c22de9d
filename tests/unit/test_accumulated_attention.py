"""The definition, held to a softmax over all keys at once."""

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels.reference import QUERY_TOKENS, accumulated_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dense(queries: Tensor, keys: Tensor) -> Tensor:
    """Head by head in float64, with the mask written out."""
    num_queries, num_heads, head_dim = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    positions = torch.arange(num_keys)
    seen = positions <= positions[num_keys - num_queries :, None]
    received = torch.zeros(num_kv_heads, num_keys, dtype=torch.float64)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        logits = queries[:, head].double() @ keys[:, kv_head].double().T
        logits = (logits / head_dim**0.5).where(seen, -torch.inf)
        received[kv_head] += logits.softmax(-1).sum(0)
    return received


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [
        (1, 1),
        (1, 63),
        (QUERY_TOKENS, 100),
        (QUERY_TOKENS + 1, QUERY_TOKENS + 1),
        (700, 900),
    ],
)
def test_equals_a_masked_softmax(num_queries, num_keys, group):
    torch.manual_seed(0)
    queries = torch.randn(num_queries, 2 * group, 10)
    keys = torch.randn(num_keys, 2, 10)
    received = accumulated_attention(queries, keys)
    torch.testing.assert_close(
        received.double(), dense(queries, keys), rtol=1e-5, atol=1e-6
    )
    given = torch.full([2], float(num_queries * group))
    torch.testing.assert_close(received.sum(-1), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computes_in_float32_whatever_the_type(dtype):
    torch.manual_seed(0)
    queries, keys = torch.randn(40, 4, 32).to(dtype), torch.randn(50, 2, 32).to(dtype)
    received = accumulated_attention(queries, keys)
    assert received.dtype == torch.float32
    torch.testing.assert_close(
        received.double(), dense(queries, keys), rtol=1e-5, atol=1e-6
    )


def test_slices_of_a_larger_buffer_are_read_alone():
    torch.manual_seed(0)
    buffer = torch.full((60, 6, 20), torch.nan)
    buffer[5:55, 1:5, 4:14] = torch.randn(50, 4, 10)
    keys, queries = buffer[5:55, 1:3, 4:14], buffer[15:55, 1:5, 4:14]
    torch.testing.assert_close(
        accumulated_attention(queries, keys).double(),
        dense(queries, keys),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_first_token_receives_all_of_its_own_attention():
    ones = torch.ones(3, 1, 8)
    expected = torch.tensor([[1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3]])
    torch.testing.assert_close(accumulated_attention(ones, ones), expected)
