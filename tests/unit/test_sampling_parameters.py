"""What requests ask of sampling, and what their drafts must not do then."""

from types import SimpleNamespace

import pytest

from vllm_budgetdraft.vllm_integration.sampling import draft_temperature


def parameters(**changes: object) -> SimpleNamespace:
    usual = {
        "temperature": 0.7,
        "seed": None,
        "structured_outputs": None,
    }
    return SimpleNamespace(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.7),
        ({"temperature": 0.0}, 0.0),
        ({"temperature": 1e-6}, 0.0),
        ({"seed": 0}, 0.0),
        ({"structured_outputs": object()}, 0.0),
    ],
)
def test_drafts_are_drawn_unless_the_draw_decides_what_is_verified(changes, expected):
    assert draft_temperature(parameters(**changes)) == expected


def test_a_request_without_parameters_drafts_greedily():
    """As a pooling request would, of which there are none beside drafts."""
    assert draft_temperature(None) == 0.0
