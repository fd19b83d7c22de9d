from itertools import accumulate, takewhile
from operator import mul
from random import Random

import pytest
import torch

from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.proposer.draft_length import confident_lengths, scheduled_length


def random_schedule(rng: Random) -> list[tuple[int, int, int]]:
    """Ranges from 1 on, some with gaps between them."""
    schedule, first = [], 1
    for _ in range(rng.randint(1, 5)):
        last = first + rng.choice([0, 0, 1, 7])
        schedule.append((first, last, rng.randint(0, 12)))
        first = last + rng.choice([1, 1, 2, 6])
    return schedule


@pytest.mark.parametrize(
    ("schedule", "lengths"),
    [
        (None, [4, 4, 4, 4, 4, 4, 4, 4]),
        ([(1, 8, 2)], [2, 2, 2, 2, 2, 2, 2, 2]),
        ([(1, 2, 3), (3, 4, 1), (5, 6, 0)], [3, 3, 1, 1, 0, 0, 0, 0]),
        ([(1, 1, 9), (4, 5, 0), (7, 7, 1)], [4, 4, 4, 0, 0, 0, 1, 1]),
    ],
    ids=["none", "one_range", "no_gaps", "gaps_and_more_than_allowed"],
)
def test_a_schedule_has_a_length_for_every_batch_size(schedule, lengths):
    assert [scheduled_length(schedule, n, 4) for n in range(1, 9)] == lengths


def test_schedules_are_read_as_vllm_reads_them():
    utils = pytest.importorskip("vllm.v1.spec_decode.dynamic.utils")
    rng = Random(0)
    for _ in range(200):
        schedule, most = random_schedule(rng), rng.randint(1, 12)
        shuffled = rng.sample(schedule, len(schedule))
        expected = utils.build_dynamic_sd_schedule_lookup(shuffled, 50, most)
        config = BudgetDraftConfig(
            model="drafter",
            num_speculative_tokens=most,
            num_speculative_tokens_per_batch_size=shuffled,
        )
        schedule = config.num_speculative_tokens_per_batch_size
        lengths = [scheduled_length(schedule, n, most) for n in range(1, 51)]
        assert lengths == expected[1:], (schedule, most)


def expected_length(confidences: list[float], threshold: float) -> int:
    products = accumulate(confidences, mul)
    return len(list(takewhile(lambda product: product >= threshold, products)))


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.7, 0.999])
def test_a_draft_ends_where_the_product_of_confidences_falls_below(threshold):
    generator = torch.Generator().manual_seed(0)
    confidences = torch.rand(500, 6, generator=generator).sqrt()
    lengths = confident_lengths(confidences, threshold)
    expected = [expected_length(row, threshold) for row in confidences.tolist()]
    assert lengths.tolist() == expected
    if threshold == 0.0:
        assert set(expected) == {6}
    else:
        assert len(set(expected)) > 1


def test_the_threshold_itself_is_enough():
    confidences = torch.tensor([[0.5, 0.5, 1.0, 0.99], [1.0, 0.25, 1.0, 1.0]])
    assert confident_lengths(confidences, 0.25).tolist() == [3, 4]


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_nothing_is_counted_from_not_a_number_on(threshold):
    nan = torch.nan
    confidences = torch.tensor([[1.0, nan, 1.0], [nan, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert confident_lengths(confidences, threshold).tolist() == [1, 0, 3]
