"""The likeliest tokens stay, and what vLLM leaves of a target is what they are."""

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import reference
from vllm_budgetdraft.proposer import truncation
from vllm_budgetdraft.proposer.truncation import truncated

VOCABULARY = 50
TOP_K = [0, 1, 2, 5, 49, 50, 51, 2**31]


def cut(logits: Tensor, top_k: list[int]) -> Tensor:
    return truncated(logits, torch.tensor(top_k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_stay_as_were_asked_for(dtype):
    torch.manual_seed(0)
    logits = torch.randn(len(TOP_K), VOCABULARY).to(dtype)
    found = cut(logits, TOP_K)
    for row, count in enumerate(TOP_K):
        last = logits[row].sort(descending=True).values[(count or VOCABULARY) - 1 :][:1]
        kept = logits[row] >= (last if len(last) else -torch.inf)
        assert torch.equal(found[row].isfinite(), kept), count
        assert torch.equal(found[row][kept], logits[row][kept])


def test_it_is_what_vllms_own_sampler_leaves():
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    torch.manual_seed(1)
    logits = torch.randn(len(TOP_K), VOCABULARY)
    k = torch.tensor([min(count or VOCABULARY, VOCABULARY) for count in TOP_K])
    expected = ops.apply_top_k_top_p_pytorch(logits.clone(), k, None)
    assert torch.equal(cut(logits, TOP_K), expected)


def test_more_than_is_looked_at_is_all(monkeypatch):
    monkeypatch.setattr(truncation, "LOOKED_AT", 8)
    logits = torch.randn(4, VOCABULARY)
    kept = cut(logits, [7, 8, 9, 0]).isfinite().sum(-1)
    assert kept.tolist() == [7, 8, VOCABULARY, VOCABULARY]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_whoever_draws_sees_what_is_not_finite(bad):
    logits = torch.zeros(2, VOCABULARY)
    logits[0], logits[1, 7] = bad, bad
    found = cut(logits, [3, 3])
    _, confidences, _ = reference.sampled_pick(found, torch.ones(2), torch.zeros(2))
    assert confidences.isfinite().tolist() == [False, bad == -float("inf")]
