"""Each objective by hand, by finite differences, and by what papers say of it."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from vllm_budgetdraft.training.objectives import (
    IGNORED,
    OBJECTIVES,
    acceptance,
    ce_loss,
    decayed_weights,
    dpace_weights,
    kl_loss,
    lk_alpha_loss,
    lk_hybrid_loss,
    tv_loss,
)
from vllm_budgetdraft.training.teacher import StoredTeacher

# Two positions of one sequence, three tokens; probabilities, so that hands can count.
Q = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]])
P = torch.tensor([[[0.25, 0.5, 0.25], [0.0625, 0.875, 0.0625]]])
EVERY_OBJECTIVE = pytest.mark.parametrize("name", OBJECTIVES)
KL = [
    0.25 * math.log(0.5) + 0.5 * math.log(2),
    0.125 * math.log(0.625) + 0.875 * math.log(0.875 / 0.8),
]


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_ce_is_minus_log_of_what_the_drafter_gives_the_targets_choice():
    found = ce_loss(Q.log(), torch.tensor([[1, IGNORED]]))
    assert found.tolist() == [[pytest.approx(math.log(4)), 0.0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kl", KL),
        ("tv", [0.25, 0.075]),
        ("lk_alpha", [-math.log(0.75), -math.log(0.925)]),
        (
            "lk_hybrid",
            [
                w * kl + (1 - w) * tv
                for kl, tv in zip(KL, (0.25, 0.075), strict=True)
                for w in (math.exp(-3 * (1 - tv)),)
            ],
        ),
    ],
)
def test_objectives_of_numbers_that_hands_can_count(name, expected):
    found = OBJECTIVES[name](Q.log(), P.log())
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)


@EVERY_OBJECTIVE
def test_gradients_are_those_of_finite_differences(name):
    log_p = logits(4, 7, seed=1).log_softmax(-1)

    def loss(x):
        log_q = x.log_softmax(-1)
        if name != "lk_hybrid":
            return OBJECTIVES[name](log_q, log_p)
        # Its weight is not differentiated: hold it.
        weight = torch.exp(-3 * acceptance(start, log_p))
        return weight * kl_loss(log_q, log_p) + (1 - weight) * tv_loss(log_q, log_p)

    x = logits(4, 7).requires_grad_()
    start = x.detach().log_softmax(-1)
    assert gradcheck(loss, (x,))
    by_hand = torch.autograd.grad(loss(x).sum(), x)[0]
    x2 = x.detach().requires_grad_()
    ours = torch.autograd.grad(OBJECTIVES[name](x2.log_softmax(-1), log_p).sum(), x2)[0]
    torch.testing.assert_close(ours, by_hand)


def test_ce_has_the_gradient_of_softmax_less_one_hot():
    x = logits(4, 7).requires_grad_()
    labels = torch.tensor([0, 3, 6, IGNORED])
    ce_loss(x.log_softmax(-1), labels).sum().backward()
    expected = x.detach().softmax(-1)
    expected[torch.arange(3), labels[:3]] -= 1
    expected[3] = 0
    torch.testing.assert_close(x.grad, expected)


def test_gradients_of_the_papers_formulas():
    """KL: q - p. TV: q_j (Q - 1[q_j < p_j]). -log alpha: the same over alpha."""
    x = logits(5, 9).requires_grad_()
    log_p = logits(5, 9, seed=1).log_softmax(-1)
    q, p = x.detach().softmax(-1), log_p.exp()
    below = (q < p).double()
    tv = q * ((q * below).sum(-1, keepdim=True) - below)
    alpha = torch.minimum(p, q).sum(-1, keepdim=True)
    for objective, expected in (
        (kl_loss, q - p),
        (tv_loss, tv),
        (lk_alpha_loss, tv / alpha),
    ):
        (found,) = torch.autograd.grad(objective(x.log_softmax(-1), log_p).sum(), x)
        torch.testing.assert_close(found, expected)


@EVERY_OBJECTIVE
def test_equal_distributions_have_no_loss_and_no_gradient(name):
    x = logits(3, 11).requires_grad_()
    loss = OBJECTIVES[name](x.log_softmax(-1), x.detach().log_softmax(-1))
    assert loss.abs().max() < 1e-12
    if name in ("kl",):  # the others have a kink there
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.abs().max() < 1e-12


def test_minus_log_alpha_of_a_certain_target_is_the_cross_entropy():
    log_q = logits(3, 11).log_softmax(-1)
    labels = torch.tensor([2, 0, 10])
    certain = torch.full((3, 11), -1e9, dtype=torch.float64)
    certain[torch.arange(3), labels] = 0
    torch.testing.assert_close(lk_alpha_loss(log_q, certain), ce_loss(log_q, labels))


def test_the_hybrid_is_kl_far_off_and_tv_nearby():
    far, near = torch.full((1, 2000), -1e4), torch.zeros(1, 2000).log_softmax(-1)
    far[0, 0] = 0
    p = torch.full((1, 2000), -1e4)
    p[0, 1:] = -math.log(1999)
    kl, tv = kl_loss(far, p), tv_loss(far, p)
    torch.testing.assert_close(lk_hybrid_loss(far, p), kl)
    assert tv == 1
    close = (near + 0.01 * torch.sin(torch.arange(2000.0))).log_softmax(-1)
    expected = 0.05 * kl_loss(near, close) + 0.95 * tv_loss(near, close)
    torch.testing.assert_close(
        lk_hybrid_loss(near, close), expected, rtol=0.01, atol=1e-6
    )


def test_disjoint_distributions_have_a_finite_loss():
    q = torch.tensor([[0.0, -1e4]])
    p = torch.tensor([[-1e4, 0.0]])
    assert torch.isfinite(lk_alpha_loss(q, p)).all()


def test_minus_log_alpha_learns_however_far_off_the_drafter_is():
    """As a new drafter is, of 128,256 tokens, where p is certain."""
    x = torch.zeros(1, 128256).requires_grad_()
    log_p = torch.full((1, 128256), -torch.inf)
    log_p[0, 7] = 0
    loss = lk_alpha_loss(x.log_softmax(-1), log_p)
    assert loss.item() == pytest.approx(math.log(128256), rel=1e-5)  # 11.762
    loss.sum().backward()
    assert x.grad[0, 7].item() == pytest.approx(-1, abs=1e-4)


@EVERY_OBJECTIVE
def test_a_token_that_cannot_be_does_no_harm(name):
    x = torch.zeros(1, 2).requires_grad_()
    loss = OBJECTIVES[name](x.log_softmax(-1), torch.tensor([[0.0, -torch.inf]]))
    loss.sum().backward()
    assert x.grad.isfinite().all() and x.grad[0, 0] < 0
    if name == "kl":
        assert loss.item() == pytest.approx(math.log(2))


def test_a_token_that_cannot_be_is_stored_at_any_temperature():
    top = torch.tensor([[0.0, -torch.inf]])
    ids = torch.tensor([[3, 1]])
    log_q = torch.zeros(1, 1, 5).log_softmax(-1)
    for temperature in (0.0, 0.5, 1.0, 2.0):
        teacher = StoredTeacher(ids[:, 0], ids, top, torch.tensor([temperature]))
        _, log_p, _ = teacher.compare(slice(0, 1), log_q)
        assert log_p[0, 0].item() == pytest.approx(0, abs=1e-4)
        assert log_p[0, 1] < -1e4


@EVERY_OBJECTIVE
def test_of_the_likeliest_tokens_alone_a_drafter_learns_these(name):
    """What is unknown of p is worth nothing to q, one token or many."""
    log_p = (2 * logits(1, 50, seed=1)).log_softmax(-1)
    some = log_p.topk(10)
    x = torch.zeros(1, 50, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        log_q = x.log_softmax(-1)
        OBJECTIVES[name](log_q.gather(-1, some.indices), some.values).sum().backward()
        optimizer.step()
    q, p = x.detach().softmax(-1)[0], log_p.exp()[0]
    known = some.indices[0]
    assert torch.minimum(q, p)[known].sum() > 0.97 * p[known].sum()


def test_decayed_weights_are_powers_of_mean_one():
    weights = decayed_weights(4, 0.5)
    assert weights.mean().item() == pytest.approx(1)
    torch.testing.assert_close(weights[1:] / weights[:-1], torch.full((3,), 0.5))


def test_dpace_weights_are_what_a_position_adds_to_the_accepted_length():
    """The gradient of sum_k prod_{i <= k} s_i in log s_j, over the length."""
    q = torch.tensor([[0.9, 0.2, 0.7], [0.1, 0.5, 1.0]], dtype=torch.float64)
    log_s = (0.5 * q + 0.5).log().requires_grad_()
    log_s.cumsum(-1).exp().sum().backward()
    torch.testing.assert_close(dpace_weights(q, 0.5), log_s.grad / 3)
    assert not dpace_weights(q.requires_grad_(), 0.5).requires_grad
