"""The definitions, held to loops over heads and tokens."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from budgetdraft_kernels.philox import philox_uniform
from budgetdraft_kernels.reference import (
    chunk_scores,
    greedy_pick,
    gumbel_pick,
    page_compaction,
    paged_cache_write,
    paged_sparse_attention,
    rotate,
    split_rotated,
)

FP8 = torch.float8_e4m3fn
#: Rounding of a few hundred terms; float64 shows that nothing else differs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


class Requests:
    """Keys and values of some requests, in lists and in scattered pages."""

    def __init__(
        self,
        lengths: list[int],
        *,
        kv_heads: int = 2,
        head_dim: int = 32,
        page_size: int = 8,
        page_list_per_head: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        held = -(-max(lengths) // page_size) + 1
        lists = len(lengths) * (kv_heads if page_list_per_head else 1)
        num_pages = lists * held + 3
        order = torch.randperm(num_pages)[: lists * held].view(len(lengths), -1, held)
        self.page_table = order if page_list_per_head else order[:, 0]
        self.lengths = torch.tensor(lengths)
        # What lies beyond a request's length is large, but finite as the pool's is.
        shape = (2, num_pages, page_size, kv_heads, head_dim)
        self.key_pages, self.value_pages = torch.full(shape, 1e4, dtype=dtype)
        self.keys, self.values = [], []
        for request, length in enumerate(lengths):
            keys, values = torch.randn(2, length, kv_heads, head_dim, dtype=dtype)
            self.keys.append(keys)
            self.values.append(values)
            for index in range(length):
                for head in range(kv_heads):
                    pages = order[request, head % order.shape[1]]
                    cell = (int(pages[index // page_size]), index % page_size, head)
                    self.key_pages[cell] = keys[index, head]
                    self.value_pages[cell] = values[index, head]

    def attend(self, queries: Tensor, counts: list[int], **options) -> Tensor:
        starts = torch.tensor([0, *counts]).cumsum(0)
        return paged_sparse_attention(
            queries,
            self.key_pages,
            self.value_pages,
            self.page_table,
            self.lengths,
            starts,
            max_query_tokens=max(counts),
            **options,
        )

    def seen(self, counts: list[int]) -> Iterator[tuple[int, int]]:
        """The request of each query token, and how many tokens it may look at."""
        for request, count in enumerate(counts):
            for token in range(count):
                length = int(self.lengths[request])
                yield request, length - count + token + 1


def naive_weights(query: Tensor, keys: Tensor, scale: float | None = None) -> Tensor:
    """Of one query token [H, D] over keys [T, G, D], head by head: [H, T]."""
    num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    return torch.stack(
        [
            (keys[:, head // group] @ query[head] * scale).softmax(0)
            for head in range(num_heads)
        ]
    )


def naive_attention(query: Tensor, keys: Tensor, values: Tensor, **options) -> Tensor:
    weights = naive_weights(query, keys, **options)
    group = len(query) // keys.shape[1]
    return torch.stack([w @ values[:, head // group] for head, w in enumerate(weights)])


def assert_attends(
    requests: Requests, queries: Tensor, counts: list[int], out: Tensor, **options
) -> None:
    assert len(out) == sum(counts)
    for token, (request, seen) in enumerate(requests.seen(counts)):
        expected = torch.zeros_like(queries[token])
        if len(requests.keys[request]):
            expected = naive_attention(
                queries[token],
                requests.keys[request][:seen],
                requests.values[request][:seen],
                **options,
            )
        torch.testing.assert_close(
            out[token], expected, rtol=0, atol=TOLERANCE[queries.dtype]
        )


def half_angles(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angles of one half, and cos and sin as ``rotate`` takes them."""
    half = 6 * torch.randn(*shape, dtype=torch.float64)
    return (
        half,
        torch.cat([half.cos(), half.cos()], -1),
        torch.cat([-half.sin(), half.sin()], -1),
    )


@pytest.mark.parametrize("page_size", [1, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [10, 32, 80])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    "counts", [[1] * 6, [2] * 6, [1, 3, 0, 5, 2, 1]], ids=["one", "two", "ragged"]
)
def test_paged_attention_equals_dense_attention_of_each_request(
    page_size, head_dim, group, counts
):
    lengths = [2, 3, page_size, page_size + 1, 5 * page_size - 2, 6 * page_size]
    lengths = [max(pair) for pair in zip(lengths, counts, strict=True)]
    requests = Requests(lengths, head_dim=head_dim, page_size=page_size)
    queries = torch.randn(sum(counts), 2 * group, head_dim)
    assert_attends(requests, queries, counts, requests.attend(queries, counts))


@pytest.mark.parametrize("page_list_per_head", [False, True])
def test_nothing_but_rounding_separates_paged_and_dense_attention(page_list_per_head):
    requests = Requests(
        [1, 63, 100],
        kv_heads=3,
        page_list_per_head=page_list_per_head,
        dtype=torch.float64,
    )
    queries = torch.randn(5, 6, 32, dtype=torch.float64)
    # float64 is for tests alone, which the checks refuse.
    out = requests.attend(queries, [1, 3, 1], validate=False)
    assert_attends(requests, queries, [1, 3, 1], out)


def test_entries_of_the_page_table_beyond_a_length_may_be_anything():
    requests = Requests([1, 17, 40])
    queries = torch.randn(3, 4, 32)
    for request, pages in enumerate((1, 3, 5)):
        requests.page_table[request, pages:] = (-1, 10**9, -7)[request]
    out = requests.attend(queries, [1, 1, 1])
    assert_attends(requests, queries, [1, 1, 1], out)


@pytest.mark.parametrize("counts", [[1, 1, 1], [0, 1, 2], [2, 2, 2]])
def test_a_request_without_tokens_attends_to_nothing(counts):
    requests = Requests([0, 9, 0])
    queries = torch.randn(sum(counts), 4, 32)
    mass = torch.full((sum(counts), 4, requests.page_table.shape[1]), torch.nan)
    out = requests.attend(queries, counts, page_mass=mass)
    assert_attends(requests, queries, counts, out)
    for token, (request, _) in enumerate(requests.seen(counts)):
        assert bool(mass[token].any()) == (request == 1)


def test_another_scale_than_the_usual():
    requests = Requests([5, 20])
    queries = torch.randn(2, 4, 32)
    out = requests.attend(queries, [1, 1], scale=0.5)
    assert_attends(requests, queries, [1, 1], out, scale=0.5)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2, 2], [1, 0, 4]])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_page_mass_is_the_share_of_attention_of_each_page(counts, scale):
    requests = Requests([2, 23, 40])
    queries = torch.randn(sum(counts), 4, 32)
    mass = torch.full((sum(counts), 4, requests.page_table.shape[1]), torch.nan)
    requests.attend(queries, counts, scale=scale, page_mass=mass)
    for token, (request, seen) in enumerate(requests.seen(counts)):
        weights = naive_weights(queries[token], requests.keys[request][:seen], scale)
        for page in range(mass.shape[-1]):
            expected = weights[:, 8 * page : 8 * page + 8].sum(-1)
            torch.testing.assert_close(
                mass[token, :, page], expected, rtol=0, atol=TOLERANCE[torch.float32]
            )


@pytest.mark.parametrize("page_list_per_head", [False, True])
def test_key_rotary_turns_keys_by_their_index_in_the_request(page_list_per_head):
    requests = Requests([2, 23, 40], page_list_per_head=page_list_per_head)
    queries = torch.randn(4, 4, 32)
    half, cos, sin = half_angles(100, 16)
    out = requests.attend(queries, [1, 2, 1], key_rotary=(cos.float(), sin.float()))
    for keys in requests.keys:
        for index in range(len(keys)):
            low, high = keys[index].clone().split(16, -1)
            c, s = half[index].cos().float(), half[index].sin().float()
            keys[index] = torch.cat([low * c - high * s, high * c + low * s], -1)
    assert_attends(requests, queries, [1, 2, 1], out)


def test_float8_pages_stand_for_multiples_of_their_scales():
    requests = Requests([3, 30])
    key_scale, value_scale = torch.tensor([0.1, 2.0]), torch.tensor([0.5, 0.03])
    for pages, scale, numbers in (
        ("key_pages", key_scale, requests.keys),
        ("value_pages", value_scale, requests.values),
    ):
        setattr(requests, pages, getattr(requests, pages).clamp(-448, 448).to(FP8))
        for x in numbers:
            x.copy_(x.to(FP8).float() * scale[:, None])
    queries = torch.randn(2, 4, 32)
    out = requests.attend(queries, [1, 1], key_scale=key_scale, value_scale=value_scale)
    assert_attends(requests, queries, [1, 1], out)


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
    keys = torch.randn(2, 3, num_tokens, 10)
    queries = torch.randn(2, 3, num_queries, 10)
    by_mean = chunk_scores(keys, queries, chunk_size, "mean_key")
    by_attention = chunk_scores(keys, queries, chunk_size, "attention")
    starts = range(0, num_tokens, chunk_size)
    assert by_mean.shape == by_attention.shape == (2, 3, len(starts))
    for layer in range(2):
        for head in range(3):
            own = keys[layer, head]
            weights = [
                (own @ query / math.sqrt(10)).softmax(0)
                for query in queries[layer, head]
            ]
            for i, start in enumerate(starts):
                chunk = slice(start, start + chunk_size)
                dots = [own[chunk].mean(0) @ query for query in queries[layer, head]]
                shares = [w[chunk].sum() for w in weights]
                for found, expected in ((by_mean, dots), (by_attention, shares)):
                    torch.testing.assert_close(
                        found[layer, head, i],
                        sum(expected) / num_queries,
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


def test_gumbel_pick_returns_the_softmax_that_it_drew_from():
    torch.manual_seed(0)
    logits = 4 * torch.randn(4, 500)
    logits[:, 7] = -torch.inf
    temperatures = torch.tensor([0.0, 0.1, 1.0, 30.0])
    tokens, confidences, probabilities = gumbel_pick(
        logits, temperatures, torch.arange(4)
    )
    assert int(tokens[0]) == int(logits[0].argmax())
    assert float(probabilities[0, tokens[0]]) == float(probabilities[0].sum()) == 1.0
    for row in range(1, 4):
        expected = (logits[row].double() / temperatures[row].double()).softmax(-1)
        torch.testing.assert_close(
            probabilities[row].double(), expected, rtol=1e-4, atol=1e-9
        )
        assert confidences[row] == probabilities[row].max()
    assert confidences[0] == greedy_pick(logits[:1])[1]


def test_a_gumbel_confidence_does_not_depend_on_what_is_drawn():
    """Else a draft that is withheld for its confidence would skew what is proposed."""
    logits = torch.randn(500).expand(64, -1)
    tokens, confidences, _ = gumbel_pick(logits, torch.ones(64), torch.arange(64))
    assert len(tokens.unique()) > 10
    assert len(confidences.unique()) == 1


def test_gumbel_noise_is_the_published_generator():
    """Known answer of Random123 for a counter and a key of zeros."""
    first_word = 0x6627E8D5
    uniform = philox_uniform(torch.tensor([0]), 3)
    expected = torch.tensor(first_word / 2**31)
    torch.testing.assert_close(uniform[0, 0], expected, rtol=1e-6, atol=0)


def test_gumbel_noise_is_uniform_and_below_one():
    uniform = philox_uniform(torch.arange(-50, 50), 1000)
    assert uniform.min() >= 0 and uniform.max() < 1
    # Of 2 ** 24 numbers, 100,000 draws hit some 300 twice.
    assert len(uniform.unique()) > 99_500
    counts = uniform.histc(10, 0, 1)
    # Four standard deviations of a tenth of 100,000 draws.
    assert (counts - 10_000).abs().max() < 4 * 95
