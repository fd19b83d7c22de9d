import pytest
import torch

from vllm_budgetdraft.cache.page_pool import PagePool
from vllm_budgetdraft.cache.ranges import runs
from vllm_budgetdraft.errors import PagePoolExhaustedError


def make_pool(num_pages=6):
    return PagePool(
        num_layers=2,
        num_pages=num_pages,
        page_size=8,
        num_kv_heads=3,
        head_dim=10,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


def test_taken_pages_are_distinct_and_no_longer_free():
    pool = make_pool()
    taken = pool.take(4)
    assert len(set(taken)) == 4
    assert set(taken).isdisjoint(pool.free_pages())
    assert sorted(taken + pool.free_pages()) == list(range(6))


def test_pages_given_back_can_be_taken_again():
    pool = make_pool()
    pool.give_back(pool.take(6))
    assert pool.num_free == 6
    assert sorted(pool.take(6)) == list(range(6))


def test_neighbours_stay_together_however_often_they_are_taken():
    """A page table takes them as ranges, and copies no list to a GPU."""
    pool = make_pool()
    for _ in range(3):
        taken = pool.take(2), pool.take(3)
        assert [len(runs(pages)) for pages in taken] == [1, 1]
        for pages in taken:
            pool.give_back(pages)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([], []),
        ([4], [range(4, 5)]),
        ([1, 2, 3], [range(1, 4)]),
        ([3, 2, 2, 3], [range(3, 4), range(2, 3), range(2, 4)]),
    ],
)
def test_runs_are_what_they_were_made_of(numbers, expected):
    assert runs(numbers) == expected
    assert [number for run in expected for number in run] == numbers


def test_an_exhausted_pool_says_what_was_asked_and_gives_none():
    pool = make_pool()
    pool.take(4)
    with pytest.raises(PagePoolExhaustedError, match="3 pages asked for, 2 of 6 free"):
        pool.take(3)
    assert pool.num_free == 2
    assert len(pool.take(2)) == 2


def test_the_bytes_counted_are_the_bytes_of_the_tensors():
    pool = make_pool()
    by_hand = 2 * 2 * (6 + 1) * 8 * 3 * 10 * 2  # K and V, layers, pages, ..., bf16
    in_memory = sum(t.untyped_storage().nbytes() for t in {pool.keys, pool.values})
    assert pool.num_bytes == by_hand == in_memory


def test_pages_start_finite_for_attention_multiplies_masked_values_by_zero():
    pool = make_pool()
    assert torch.isfinite(pool.keys).all() and torch.isfinite(pool.values).all()
