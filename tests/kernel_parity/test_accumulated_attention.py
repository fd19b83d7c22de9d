"""Attention received by keys, among keys and queries that are NaN around the prompt."""

from functools import partial

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import fused, launch_settings, reference
from tests.kernel_parity.test_checks import both, on, strided, zeros
from tests.kernel_parity.tolerances import assert_close

#: Query tokens, tokens, KV heads, query heads of each, and head size.
SIZES = {
    "one_token": (1, 1, 1, 1, 32),
    "one_token_of_many": (1, 257, 2, 4, 64),
    "whole_prompt": (63, 63, 3, 3, 10),
    "several_tiles": (257, 257, 1, 1, 32),
    "last_part": (63, 100, 2, 3, 80),
    "whole_tiles": (64, 128, 2, 1, 64),
    "odd_parts": (100, 257, 1, 3, 96),
    "head_dim_128": (17, 130, 2, 4, 128),
    "head_dim_256": (33, 70, 1, 4, 256),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

Sizes = tuple[int, int, int, int, int]


def prompt(sizes: Sizes, dtype: torch.dtype, device: torch.device):
    """Queries and keys, slices of buffers that hold NaN wherever nobody may look."""
    torch.manual_seed(0)
    num_queries, num_keys, kv_heads, group, head_dim = sizes

    def surrounded(tokens: int, heads: int) -> Tensor:
        around = torch.full((tokens + 2, heads + 2, head_dim + 3), torch.nan)
        around[1:-1, 1:-1, 1:-2] = torch.randn(tokens, heads, head_dim)
        return around.to(device, dtype)[1:-1, 1:-1, 1:-2]

    return surrounded(num_queries, kv_heads * group), surrounded(num_keys, kv_heads)


def cut_into(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(
        launch_settings,
        "attention_splits",
        lambda programs, tiles, device: min(parts, tiles),
    )


@pytest.mark.parametrize("parts", [1, 3], ids=["whole", "in_3_parts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equals_the_definition(sizes, dtype, parts, device, monkeypatch):
    cut_into(monkeypatch, parts)
    queries, keys = prompt(sizes, dtype, device)
    found = fused.accumulated_attention(queries, keys)
    expected = reference.accumulated_attention(queries, keys)
    num_queries, num_keys, kv_heads, group, _ = sizes
    assert found.dtype == expected.dtype == torch.float32
    assert found.shape == expected.shape == (kv_heads, num_keys)
    # Products of rounded numbers are exact; they are summed in float32.
    assert_close("received", found, expected, torch.float32)
    given = torch.full([kv_heads], float(num_queries * group), device=device)
    assert_close("sums", found.sum(-1), given, torch.float32)


@pytest.mark.parametrize("parts", [1, 3], ids=["whole", "in_3_parts"])
@pytest.mark.parametrize("factor", [100.0, -100.0])
def test_survives_logits_that_overflow_an_exponential(
    factor, parts, device, monkeypatch
):
    cut_into(monkeypatch, parts)
    queries, keys = prompt(SIZES["last_part"], torch.float32, device)
    queries, keys = queries.abs(), factor * keys.abs()
    found = fused.accumulated_attention(queries, keys)
    expected = reference.accumulated_attention(queries, keys)
    # Logits near 1,000 are 2 ** -14 apart.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@both
@pytest.mark.parametrize("num_keys", [0, 5])
def test_without_query_tokens_nothing_is_received(num_keys, module, device):
    queries, keys = prompt((0, num_keys, 2, 3, 32), torch.bfloat16, device)
    received = module.accumulated_attention(queries, keys)
    assert received.dtype == torch.float32
    assert torch.equal(received, torch.zeros(2, num_keys, device=device))


def test_equal_arguments_have_equal_results(device, monkeypatch):
    cut_into(monkeypatch, 3)
    queries, keys = prompt(SIZES["odd_parts"], torch.bfloat16, device)
    call = partial(fused.accumulated_attention, queries, keys)
    assert torch.equal(call(), call())


#: Valid are queries of 3 tokens and 4 heads, and keys of 9 tokens and 2 heads.
WRONG = [
    (ValueError, {"queries": zeros(3, 128)}, r"queries .*\[3, 128\], not \[T, H, D\]"),
    (ValueError, {"keys": zeros(2, 9, 2, 32)}, r"keys .*32\], not \[S, G, D=32\]"),
    (ValueError, {"keys": zeros(9, 2, 16)}, r"keys .*\[9, 2, 16\], .*D=32"),
    (ValueError, {"keys": zeros(9, 3, 32)}, r"queries have 4 heads.* the 3 KV heads"),
    (ValueError, {"keys": zeros(2, 2, 32)}, r"queries have 3 tokens and keys only 2"),
    (ValueError, {"queries": strided(3, 4, 32)}, r"queries .*strides \(256, 64, 2\)"),
    (ValueError, {"keys": strided(9, 2, 32)}, r"keys has strides \(128, 64, 2\)"),
    (ValueError, {"keys": zeros(9, 2, 32).to("meta")}, r"several devices.*meta"),
    (TypeError, {"queries": zeros(3, 4, 32).double()}, r"queries is torch\.float64"),
    (TypeError, {"keys": zeros(9, 2, 32).half()}, r"keys .*16, not torch\.float32"),
]


@both
@pytest.mark.parametrize(("error", "change", "message"), WRONG)
def test_wrong_arguments_are_refused(error, change, message, module, device):
    arguments = {"queries": zeros(3, 4, 32), "keys": zeros(9, 2, 32), **change}
    with pytest.raises(error, match=message):
        module.accumulated_attention(*(on(device, x) for x in arguments.values()))
