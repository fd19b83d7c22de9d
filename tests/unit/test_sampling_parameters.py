"""What requests ask of sampling, and what their drafts must not do then."""

from types import SimpleNamespace

import pytest
import torch

from vllm_budgetdraft.config import SettledConfig

vllm = pytest.importorskip("vllm")

from vllm_budgetdraft.vllm_integration.sampling import (  # noqa: E402
    DraftSampling,
    as_tensors,
    draft_sampling,
    most_drafts,
)

GREEDY = DraftSampling()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, DraftSampling(0.7)),
        ({"temperature": 0.0}, GREEDY),
        ({"temperature": 0.0, "top_p": 0.5}, GREEDY),
        ({"seed": 0, "top_k": 5}, GREEDY),
        ({"top_k": -1}, DraftSampling(0.7)),
        ({"top_k": 20, "top_p": 0.8, "min_p": 0.05}, DraftSampling(0.7, 20)),
    ],
)
def test_drafts_are_drawn_unless_the_draw_decides_what_is_verified(asked, expected):
    asked = {"temperature": 0.7} | asked
    assert draft_sampling(vllm.SamplingParams(**asked)) == expected


def test_a_grammar_has_the_likeliest_drafted():
    params = vllm.SamplingParams(temperature=0.7)
    params.structured_outputs = object()
    assert draft_sampling(params) == GREEDY


def test_a_request_without_parameters_drafts_greedily():
    """As a pooling request would, of which there are none beside drafts."""
    assert draft_sampling(None) == GREEDY


def test_a_batch_is_told_of_what_any_request_asks():
    device = torch.device("cpu")
    assert as_tensors([GREEDY, GREEDY], device) == (None, None)
    temperatures, top_k = as_tensors([GREEDY, DraftSampling(0.7)], device)
    assert temperatures.tolist() == pytest.approx([0.0, 0.7]) and top_k is None
    temperatures, top_k = as_tensors([DraftSampling(1.0, 3), GREEDY], device)
    assert temperatures.tolist() == [1.0, 0.0] and top_k.tolist() == [3, 0]
    assert temperatures.dtype == torch.float32 and top_k.dtype == torch.int64


@pytest.mark.parametrize(
    ("extra_args", "has_embeddings", "most"),
    [
        (None, False, 5),
        ({"kv_budget": 40}, False, 5),
        ({"num_speculative_tokens": 2, "of another": "x"}, False, 2),
        ({"num_speculative_tokens": 0}, False, 0),
        ({"num_speculative_tokens": 2}, True, 0),
        ({"num_speculative_tokens": "many"}, False, 0),
        ({"num_speculative_tokens": 6}, False, 0),
    ],
)
def test_the_scheduler_knows_how_many_drafts_a_request_may_have(
    extra_args, has_embeddings, most
):
    config = SettledConfig(model="drafter", num_speculative_tokens=5)
    request = SimpleNamespace(
        prompt_embeds=torch.ones(1) if has_embeddings else None,
        sampling_params=vllm.SamplingParams(extra_args=extra_args),
    )
    assert most_drafts(request, config) == most
