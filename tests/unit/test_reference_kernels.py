"""The definitions, held to loops over heads and tokens."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from budgetdraft_kernels.reference import (
    chunk_scores,
    greedy_pick,
    page_compaction,
    paged_cache_write,
    rotate,
    sampled_pick,
    split_rotated,
)
from tests.support.angles import half_angles

FP8 = torch.float8_e4m3fn


def test_paged_cache_write_fills_the_named_cells_and_no_other():
    torch.manual_seed(0)
    key_pages, value_pages = torch.zeros(2, 5, 8, 3, 10)
    qkv = torch.randn(4, 2 + 2 * 3, 10)
    _, cos, sin = half_angles(4, 5)
    cells = torch.tensor([7, 8, 39, 16])

    queries = paged_cache_write(
        qkv, cos.float(), sin.float(), key_pages, value_pages, cells
    )

    wanted = split_rotated(qkv, cos.float(), sin.float(), 3)
    assert torch.equal(queries, wanted[0])
    for pages, written in ((key_pages, wanted[1]), (value_pages, wanted[2])):
        for token, cell in enumerate(cells.tolist()):
            assert torch.equal(pages[cell // 8, cell % 8], written[token])
        assert int(pages.any(-1).any(-1).sum()) == 4


def test_split_rotated_turns_queries_and_keys_but_not_values():
    torch.manual_seed(0)
    qkv = torch.randn(4, 5 + 2 * 3, 10)
    _, cos, sin = (x.float() for x in half_angles(4, 5))
    queries, keys, values = split_rotated(qkv, cos, sin, 3)
    rotated = rotate(qkv, cos[:, None], sin[:, None])
    assert torch.equal(queries, rotated[:, :5])
    assert torch.equal(keys, rotated[:, 5:8])
    assert torch.equal(values, qkv[:, 8:])


def test_keys_may_be_stored_as_they_are():
    torch.manual_seed(0)
    key_pages, value_pages = torch.zeros(2, 1, 8, 2, 10)
    qkv = torch.randn(3, 3 + 2 * 2, 10)
    _, cos, sin = (x.float() for x in half_angles(3, 5))
    queries = paged_cache_write(
        qkv,
        cos,
        sin,
        key_pages,
        value_pages,
        torch.tensor([0, 1, 2]),
        rotate_keys=False,
    )
    assert torch.equal(queries, rotate(qkv[:, :3], cos[:, None], sin[:, None]))
    assert torch.equal(key_pages[0, :3], qkv[:, 3:5])
    assert torch.equal(value_pages[0, :3], qkv[:, 5:])


def test_float8_pages_hold_the_nearest_number_and_saturate():
    numbers = torch.tensor([1e6, -1e6, 449.0, 448.0, 1.0625, 1.1875, 0.0, 2e-3])
    nearest = torch.tensor([448, -448, 448, 448, 1.0, 1.25, 0.0, 2**-9])
    key_scale, value_scale = torch.tensor([0.5, 1.0]), torch.tensor([2.0, 0.25])
    scales = torch.stack([torch.ones(2), key_scale, value_scale])
    # One query head, and the key and value heads of both KV heads.
    qkv = numbers * scales.flatten()[1:, None]
    key_pages, value_pages = torch.zeros(2, 1, 1, 2, 8).to(FP8)
    paged_cache_write(
        qkv[None],
        torch.ones(1, 8),
        torch.zeros(1, 8),
        key_pages,
        value_pages,
        torch.tensor([0]),
        key_scale=key_scale,
        value_scale=value_scale,
    )
    for pages in (key_pages, value_pages):
        assert torch.equal(pages[0, 0].float(), nearest.expand(2, -1))


@pytest.mark.parametrize("head_dim", [10, 32, 64, 80])
def test_rotate_turns_queries_and_keys_as_transformers_does(head_dim):
    torch.manual_seed(0)
    batch, tokens, heads, kv_heads = 2, 5, 6, 2
    queries = torch.randn(batch, tokens, heads, head_dim, dtype=torch.float64)
    keys = torch.randn(batch, tokens, kv_heads, head_dim, dtype=torch.float64)
    half, cos, signed = half_angles(batch, tokens, head_dim // 2)
    expected = apply_rotary_pos_emb(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        cos,
        torch.cat([half.sin(), half.sin()], -1),
    )
    # Ours takes the sine with its first half negated.
    for ours, theirs in zip((queries, keys), expected, strict=True):
        rotated = rotate(ours, cos[:, :, None], signed[:, :, None])
        torch.testing.assert_close(rotated, theirs.transpose(1, 2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize("chunk_size", [1, 5, 8, 100])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_chunk_scores_equal_those_of_loops(num_tokens, chunk_size, num_queries):
    torch.manual_seed(0)
    num_queries = min(num_queries, num_tokens)
    keys = torch.randn(2, 3, num_tokens, 10)
    queries = torch.randn(2, 3, 2, num_queries, 10)
    by_mean = chunk_scores(keys, queries, chunk_size, "mean_key")
    by_attention = chunk_scores(keys, queries, chunk_size, "attention")
    starts = range(0, num_tokens, chunk_size)
    assert by_mean.shape == by_attention.shape == (2, 3, len(starts))
    for layer in range(2):
        for head in range(3):
            own = keys[layer, head]
            weights = []
            for each in queries[layer, head]:
                for back, query in enumerate(each.flip(0)):
                    logits = own @ query / math.sqrt(10)
                    logits[num_tokens - back :] = -math.inf  # later than its own key
                    weights.append(logits.softmax(0))
            for i, start in enumerate(starts):
                chunk = slice(start, start + chunk_size)
                every_query = queries[layer, head].flatten(0, 1)
                dots = [own[chunk].mean(0) @ query for query in every_query]
                shares = [w[chunk].sum() for w in weights]
                for found, expected in ((by_mean, dots), (by_attention, shares)):
                    torch.testing.assert_close(
                        found[layer, head, i],
                        sum(expected) / (2 * num_queries),
                        rtol=1e-5,
                        atol=1e-5,
                    )


@pytest.mark.parametrize("num_kept", [0, 1, 9, 20])
@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_page_compaction_puts_each_kept_token_into_its_cell(num_kept, dtype):
    torch.manual_seed(0)
    layers, kv_heads, page_size = 2, 3, 4
    keys, values = torch.randn(2, layers, 20, kv_heads, 10)
    kept = torch.stack([torch.randperm(20)[:num_kept] for _ in range(6)])
    kept = kept.view(layers, kv_heads, num_kept)
    cells = torch.randperm(24)[:num_kept]
    scales = torch.rand(2, layers, kv_heads) + 0.1 if dtype == FP8 else [None, None]
    key_pages, value_pages = torch.zeros(2, layers, 6, page_size, kv_heads, 10).to(
        dtype
    )
    page_compaction(
        keys,
        values,
        kept,
        key_pages,
        value_pages,
        cells,
        key_scale=scales[0],
        value_scale=scales[1],
    )
    for pages, states, scale in (
        (key_pages, keys, scales[0]),
        (value_pages, values, scales[1]),
    ):
        expected = torch.zeros(layers, 6, page_size, kv_heads, 10)
        for layer in range(layers):
            for head in range(kv_heads):
                for order, cell in enumerate(cells.tolist()):
                    row = states[layer, int(kept[layer, head, order]), head]
                    if scale is not None:
                        row = (row / scale[layer, head]).clamp(-448, 448)
                    place = (layer, cell // page_size, cell % page_size, head)
                    expected[place] = row.to(dtype).float()
        assert torch.equal(pages.float(), expected)


@pytest.mark.parametrize("vocab_size", [1, 63, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_pick_gives_the_likeliest_and_its_softmax(vocab_size, dtype):
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, vocab_size)).to(dtype)
    tokens, confidences = greedy_pick(logits)
    assert tokens.tolist() == [row.tolist().index(row.max()) for row in logits]
    expected = logits.double().softmax(-1).amax(-1)
    torch.testing.assert_close(confidences.double(), expected, rtol=1e-5, atol=0)


def test_sampled_pick_returns_the_softmax_that_it_drew_from():
    torch.manual_seed(0)
    logits = 4 * torch.randn(4, 500)
    logits[:, 7] = -torch.inf
    temperatures = torch.tensor([0.0, 0.1, 1.0, 30.0])
    tokens, confidences, probabilities = sampled_pick(
        logits, temperatures, torch.rand(4)
    )
    assert int(tokens[0]) == int(logits[0].argmax())
    assert float(probabilities[0, tokens[0]]) == float(probabilities[0].sum()) == 1.0
    for row in range(1, 4):
        expected = (logits[row].double() / temperatures[row].double()).softmax(-1)
        torch.testing.assert_close(
            probabilities[row].double(), expected, rtol=1e-4, atol=1e-9
        )
        assert confidences[row] == probabilities[row].max()
    torch.testing.assert_close(confidences[:1], greedy_pick(logits[:1])[1])


def test_a_low_temperature_loses_no_difference_between_large_logits():
    """Over the temperature they are 1e7, where float32 steps by 1."""
    logits = 1e4 + torch.tensor([[0.0, 0.0, -1.0, -3.0]]) / 1024
    temperature = torch.tensor([1e-3])
    _, confidences, probabilities = sampled_pick(
        logits, temperature, torch.tensor([0.5])
    )
    expected = (logits.double() / temperature.double()).softmax(-1)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-6, atol=0)
    assert confidences[0] == probabilities.max()


def test_a_drawn_confidence_does_not_depend_on_what_is_drawn():
    """Else a draft that is withheld for its confidence would skew what is proposed."""
    logits = torch.randn(500).expand(64, -1)
    tokens, confidences, _ = sampled_pick(logits, torch.ones(64), torch.rand(64))
    assert len(tokens.unique()) > 10
    assert len(confidences.unique()) == 1
