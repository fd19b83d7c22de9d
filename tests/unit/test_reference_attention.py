"""The definition of attention over pages, held to loops over heads and tokens."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels.reference import paged_sparse_attention
from tests.support.angles import half_angles

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
    shares = torch.full((sum(counts), 4, requests.page_table.shape[1]), torch.nan)
    out = requests.attend(queries, counts, page_attention=shares)
    assert_attends(requests, queries, counts, out)
    for token, (request, _) in enumerate(requests.seen(counts)):
        assert bool(shares[token].any()) == (request == 1)


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
    shares = torch.full((sum(counts), 4, requests.page_table.shape[1]), torch.nan)
    requests.attend(queries, counts, scale=scale, page_attention=shares)
    for token, (request, seen) in enumerate(requests.seen(counts)):
        weights = naive_weights(queries[token], requests.keys[request][:seen], scale)
        for page in range(shares.shape[-1]):
            expected = weights[:, 8 * page : 8 * page + 8].sum(-1)
            torch.testing.assert_close(
                shares[token, :, page], expected, rtol=0, atol=TOLERANCE[torch.float32]
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
