"""Cuts of drafts are those that vLLM makes of the target, by the letter."""

import pytest
import torch
from torch import Tensor

from vllm_budgetdraft.proposer import truncation
from vllm_budgetdraft.proposer.truncation import truncated

VOCABULARY = 50
CUTS = [
    (0.0, 1.0, 0.0),
    (1.0, 1.0, 0.0),
    (5.0, 1.0, 0.0),
    (49.0, 1.0, 0.0),
    (0.0, 0.01, 0.0),
    (0.0, 0.5, 0.0),
    (0.0, 0.9, 0.0),
    (0.0, 1.0, 0.1),
    (0.0, 1.0, 1.0),
    (10.0, 0.6, 0.0),
    (10.0, 0.9, 0.05),
    (0.0, 0.7, 0.02),
]


def by_the_letter(logits: Tensor, temperature: float, cut: tuple) -> Tensor:
    """vLLM's order: min-p, top-k, top-p; each of what the one before has left."""
    top_k, top_p, min_p = cut
    p = (logits.double() / temperature).softmax(-1)
    p = p.where(p >= min_p * p.max(), 0.0)
    if top_k:
        p = p.where(p >= p.sort(descending=True).values[int(top_k) - 1], 0.0)
    p = p / p.sum()
    order = p.argsort(descending=True)
    before = p[order].cumsum(-1) - p[order]
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[order] = (before < top_p) | (top_p >= 1)
    return kept & (p > 0)


def cut(logits: Tensor, temperatures: list[float], cuts: list) -> Tensor:
    return truncated(logits, torch.tensor(temperatures), torch.tensor(cuts))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_what_is_left_is_what_vllm_leaves(temperature):
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(CUTS), VOCABULARY)
    found = cut(logits, [temperature] * len(CUTS), CUTS)
    for row, asked in enumerate(CUTS):
        kept = by_the_letter(logits[row], temperature, asked)
        assert torch.equal(found[row].isfinite(), kept), asked
        assert torch.equal(found[row][kept], logits[row][kept])


def test_it_is_what_vllms_own_sampler_leaves():
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    torch.manual_seed(1)
    logits = 3 * torch.randn(len(CUTS), VOCABULARY)
    no_min_p = [(k, p, 0.0) for k, p, _ in CUTS]
    k = torch.tensor([int(k) or VOCABULARY for k, _, _ in CUTS])
    p = torch.tensor([p for _, p, _ in CUTS])
    expected = ops.apply_top_k_top_p_pytorch(logits.clone(), k, p)
    found = cut(logits, [1.0] * len(CUTS), no_min_p)
    assert torch.equal(found, expected)


def test_a_greedy_row_is_left_as_it_is():
    logits = torch.randn(2, VOCABULARY)
    found = cut(logits, [0.0, 1.0], [(1.0, 0.1, 0.5)] * 2)
    assert torch.equal(found[0], logits[0]) and found[1].isfinite().sum() == 1


def test_more_than_is_looked_at_is_all(monkeypatch):
    """A row of 50 tokens, all as likely; of 8 it is known how many they are."""
    monkeypatch.setattr(truncation, "LOOKED_AT", 8)
    flat = torch.zeros(4, VOCABULARY) - torch.arange(VOCABULARY) / 1e3
    cuts = [(0.0, 0.9, 0.0), (20.0, 1.0, 0.0), (5.0, 1.0, 0.0), (0.0, 0.1, 0.0)]
    kept = cut(flat, [1.0] * 4, cuts).isfinite().sum(-1)
    assert kept.tolist() == [VOCABULARY, VOCABULARY, 5, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_no_error(bad):
    """Whoever draws sees that it is not."""
    logits = torch.full((3, VOCABULARY), bad)
    logits[1] = 0.0
    logits[1, 7] = bad
    found = cut(logits, [1.0] * 3, [(3.0, 0.9, 0.1)] * 3)
    assert found.shape == logits.shape
    assert not found[0].isfinite().any() and not found[2].isfinite().any()
