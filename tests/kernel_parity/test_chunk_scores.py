import pytest
import torch

from budgetdraft_kernels import fused, reference
from tests.kernel_parity.tolerances import assert_close

#: Layers, KV heads, tokens, heads of each, queries and head size.
SIZES = {
    "plain": (2, 2, 100, 2, 4, 64),
    "one_token": (1, 1, 1, 1, 1, 32),
    "63_tokens": (2, 3, 63, 1, 1, 10),
    "tile_of_64": (1, 2, 64, 1, 16, 80),
    "several_tiles": (1, 3, 257, 1, 17, 96),
    "many_queries": (1, 1, 130, 4, 40, 128),
    "head_dim_256": (1, 1, 70, 3, 3, 256),
    "as_many_queries_as_keys": (1, 2, 9, 2, 9, 32),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def prompt(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """Keys as a prefill leaves them, tokens first, with NaN around; and queries."""
    torch.manual_seed(0)
    layers, kv_heads, num_tokens, heads, num_queries, head_dim = sizes
    around = torch.full((layers, num_tokens + 2, kv_heads, head_dim), torch.nan)
    around[:, 1:-1] = torch.randn(layers, num_tokens, kv_heads, head_dim)
    keys = around.to(device, dtype)[:, 1:-1].transpose(1, 2)
    around = torch.full((layers, kv_heads, heads, num_queries + 1, head_dim), torch.nan)
    around[..., :-1, :] = torch.randn(layers, kv_heads, heads, num_queries, head_dim)
    return keys, around.to(device, dtype)[..., :-1, :]


@pytest.mark.parametrize("score", ["mean_key", "attention"])
@pytest.mark.parametrize("chunk_size", [1, 5, 8, 64, 100])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equals_the_definition(sizes, chunk_size, score, device):
    # Types take turns, for the sizes matter to each alike.
    dtype = DTYPES[(chunk_size + sizes[2]) % 3]
    keys, queries = prompt(sizes, dtype, device)
    found = fused.chunk_scores(keys, queries, chunk_size, score)
    expected = reference.chunk_scores(keys.float(), queries.float(), chunk_size, score)
    assert found.shape == (*keys.shape[:2], -(-sizes[2] // chunk_size))
    # Products of rounded numbers are exact; they are summed in float32.
    scale = 1 if score == "attention" else sizes[-1] ** 0.5
    assert_close("scores", found / scale, expected / scale, torch.float32)
    if score == "attention":
        ones = torch.ones(keys.shape[:2], device=device)
        assert_close("sums", found.sum(-1), ones, torch.float32)


@pytest.mark.parametrize("score", ["mean_key", "attention"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_read_as_it_is(dtype, score, device):
    keys, queries = prompt(SIZES["plain"], dtype, device)
    found = fused.chunk_scores(keys, queries, 8, score)
    expected = reference.chunk_scores(keys, queries, 8, score)
    assert_close("scores", found / 8, expected / 8, torch.float32)


def test_float64_is_scored_as_the_definition_does(device):
    keys, queries = prompt(SIZES["plain"], torch.float64, device)
    for score in ("mean_key", "attention"):
        found = fused.chunk_scores(keys, queries, 8, score)
        expected = reference.chunk_scores(keys, queries, 8, score)
        assert found.dtype == expected.dtype
        assert_close(score, found / 8, expected / 8, torch.float32)


@pytest.mark.parametrize("factor", [100.0, -100.0])
def test_attention_survives_logits_that_overflow_an_exponential(factor, device):
    keys, queries = prompt(SIZES["several_tiles"], torch.float32, device)
    keys = factor * keys.abs()
    queries = queries.abs()
    found = fused.chunk_scores(keys, queries, 8, "attention")
    expected = reference.chunk_scores(keys, queries, 8, "attention")
    # Logits near 10,000 are 2 ** -10 apart.
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("score", ["mean_key", "attention"])
def test_a_chunk_longer_than_the_prompt_has_one_score(score, device):
    keys, queries = prompt((1, 2, 5, 1, 2, 32), torch.float32, device)
    found = fused.chunk_scores(keys, queries, 100, score)
    expected = reference.chunk_scores(keys, queries, 100, score)
    assert found.shape == (1, 2, 1)
    assert_close("scores", found / 8, expected / 8, torch.float32)


@pytest.mark.parametrize("module", [reference, fused], ids=["reference", "fused"])
def test_a_query_sees_no_key_that_is_later_than_its_own(module, device):
    """All keys are 0 but the last of 24, which the last of 16 queries alone sees.

    Before it, attention is even: the i-th query's over i of 24 tokens, by hand.
    """
    keys = torch.zeros(1, 1, 24, 4, device=device)
    keys[0, 0, 23, 0] = 40.0
    queries = torch.zeros(1, 1, 1, 16, 4, device=device)
    queries[..., 0] = 1.0
    found = module.chunk_scores(keys, queries, 8, "attention")
    early = [8 / seen for seen in range(9, 24)]
    second = [min(8, seen - 8) / seen for seen in range(9, 24)]
    third = [max(0, seen - 16) / seen for seen in range(9, 24)]
    expected = [sum(early) / 16, sum(second) / 16, (sum(third) + 1) / 16]
    assert found[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx([0.508, 0.345, 0.146], abs=1e-3)
