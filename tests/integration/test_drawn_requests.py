"""Drawn drafts of model runner V1: what their requests ask for reaches the draws."""

import pytest

from tests.support.adapter import Engine
from tests.support.models import VOCAB_SIZE

pytestmark = pytest.mark.vllm

NUM_DRAFTS = 3


def test_drafts_are_of_the_likeliest_that_a_request_asks_for(drafter_folder):
    engine = Engine(
        drafter_folder,
        num_slots=3,
        max_model_len=256,
        num_speculative_tokens=NUM_DRAFTS,
        draft_sample_method="probabilistic",
    )
    asked = {"two": (1.0, 2), "greedy": (0.0, 2), "all": (1.0, 0)}
    for name, (temperature, top_k) in asked.items():
        engine.start(name, 40)
        params = engine.requests[name].sampling_params
        params.temperature, params.top_k = temperature, top_k
    engine.step()
    names, probabilities = engine.proposer.take_probabilities()
    counts = dict(zip(names, (probabilities > 0).sum(-1).tolist(), strict=True))
    assert counts == {
        "two": [2] * NUM_DRAFTS,
        "greedy": [1] * NUM_DRAFTS,
        "all": [VOCAB_SIZE] * NUM_DRAFTS,
    }
