"""What steps cost by batch size and draft length, from some that were timed."""

import pytest

from vllm_budgetdraft.proposer.step_costs import StepCosts

COSTS = StepCosts(
    target={1: 10.0, 2: 12.0, 4: 13.0, 8: 17.0},
    draft={1: {1: 1.0, 4: 2.0}, 3: {1: 3.0, 4: 8.0}},
    max_length=3,
)


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        # 2, 3 and 4 tokens are verified, and 1, 2 and 3 drafted.
        (1, [10, 12 + 1, 12.5 + 2, 13 + 3]),
        # 6 tokens lie between 4 and 8; two requests between one and four.
        (2, [12, 13 + 4 / 3, 15 + 3, 17 + 14 / 3]),
        # 12 and 16 tokens are beyond what was timed, at a second each.
        (4, [13, 17 + 2, 21 + 5, 25 + 8]),
    ],
)
def test_what_was_not_timed_lies_between_or_beyond_what_was(batch_size, expected):
    assert COSTS.by_length(batch_size).tolist() == pytest.approx(expected)


def test_a_disturbed_time_is_not_believed():
    """More tokens took less: whatever stretched the smaller pass was no work of it."""
    costs = StepCosts({1: 9.0, 2: 90.0, 4: 12.0, 8: 13.0}, {}, 3)
    assert costs.by_length(1).tolist() == [9, 12, 12, 12]


def test_one_length_and_one_size_are_enough():
    assert StepCosts({1: 5.0}, {1: {1: 2.0}}, 1).by_length(9).tolist() == [5, 7]


def test_a_token_takes_its_part_of_what_verifying_drafts_takes():
    assert COSTS.token_seconds(2, 3) == pytest.approx((17 - 12) / 6)
