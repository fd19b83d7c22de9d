"""The chunked loss is the plain one, whatever the objective and the weights."""

from dataclasses import replace

import pytest
import torch

from tests.support import models
from vllm_budgetdraft.training.arguments import ObjectiveArguments
from vllm_budgetdraft.training.losses import (
    _position_weights,
    multi_view_loss,
    view_losses,
)
from vllm_budgetdraft.training.objectives import IGNORED, OBJECTIVES
from vllm_budgetdraft.training.teacher import (
    LiveTeacher,
    StoredTeacher,
    last_hidden,
)

VIEWS, POSITIONS, WIDTH, VOCABULARY = 3, 24, 8, 30
WEIGHTS = torch.tensor([1.0, 0.25, 0.25])
POSITION_WEIGHTS = ("uniform", "decay", "dpace")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def live() -> LiveTeacher:
    head = matrix(random(VOCABULARY, 5, seed=3))
    return LiveTeacher(random(POSITIONS, 5, seed=2), head)


def stored() -> StoredTeacher:
    log_p = (2 * random(POSITIONS, VOCABULARY, seed=4)).log_softmax(-1)
    top = log_p.topk(6)
    return StoredTeacher(top.indices[:, 1], top.indices, top.values)


def loss_and_gradients(teacher, settings, chunk_tokens, hidden=None):
    hidden = random(VIEWS, POSITIONS, WIDTH) if hidden is None else hidden
    hidden = hidden.requires_grad_()
    head = random(VOCABULARY, WIDTH, seed=1).requires_grad_()
    counted = torch.arange(POSITIONS) % 5 != 2
    loss, means = multi_view_loss(
        hidden, head, teacher, counted, WEIGHTS, settings, chunk_tokens
    )
    (3 * loss).backward()  # so that the gradient that comes in is not 1
    return loss.detach(), means, hidden.grad, head.grad


@pytest.mark.parametrize("teacher", [live(), stored()], ids=["live", "stored"])
@pytest.mark.parametrize("position_weights", POSITION_WEIGHTS)
@pytest.mark.parametrize("objective", ["ce", *OBJECTIVES])
def test_in_chunks_it_is_the_same(objective, position_weights, teacher):
    settings = ObjectiveArguments(objective, position_weights, draft_tokens=4)
    whole = loss_and_gradients(teacher, settings, 0)
    for chunk_tokens in (4, 16, 1000):
        for found, expected in zip(
            loss_and_gradients(teacher, settings, chunk_tokens), whole, strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_it_is_the_weighted_sum_of_the_views_means_over_what_counts():
    settings = ObjectiveArguments("kl")
    teacher, hidden = live(), random(VIEWS, POSITIONS, WIDTH)
    head = random(VOCABULARY, WIDTH, seed=1)
    counted = torch.zeros(POSITIONS, dtype=torch.bool)
    counted[[3, 7]] = True
    loss, means = multi_view_loss(hidden, head, teacher, counted, WEIGHTS, settings, 8)
    log_p = teacher.compare(slice(0, POSITIONS), hidden)[1]
    log_q = (hidden @ head.T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = (kl[:, 3] + kl[:, 7]) / 2
    torch.testing.assert_close(means.losses, expected)
    torch.testing.assert_close(loss, (WEIGHTS * expected).sum())


def test_agreements_and_acceptances_are_shares_of_what_counts():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [1.0, 0, 0]])
    teacher = LiveTeacher((p + 1e-9).log(), matrix(torch.eye(3)))
    hidden = torch.tensor([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.0, 1.0, 0.0]]])
    counted = torch.tensor([True, True, False])
    _, means = multi_view_loss(
        (hidden + 1e-9).log(),
        torch.eye(3),
        teacher,
        counted,
        torch.ones(1),
        ObjectiveArguments("tv"),
        0,
    )
    assert means.agreements.tolist() == [0.5]
    assert means.acceptances.tolist() == [pytest.approx((1 + 0.4) / 2, rel=1e-5)]


def test_nothing_that_counts_is_no_loss():
    counted = torch.zeros(POSITIONS, dtype=torch.bool)
    hidden = random(VIEWS, POSITIONS, WIDTH).requires_grad_()
    loss, _ = multi_view_loss(
        hidden,
        random(VOCABULARY, WIDTH, seed=1),
        live(),
        counted,
        WEIGHTS,
        ObjectiveArguments("kl"),
        8,
    )
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_logits_have_a_float32_loss(objective):
    settings = ObjectiveArguments(objective)
    logits = random(1, POSITIONS, VOCABULARY).bfloat16()
    rows, counted = slice(0, POSITIONS), torch.ones(POSITIONS, dtype=torch.bool)
    found = view_losses(logits, live(), rows, counted, settings)
    expected = view_losses(logits.float(), live(), rows, counted, settings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_of_a_draft_fall_or_follow_what_the_drafter_knows():
    hidden, teacher = random(1, POSITIONS, WIDTH), live()
    logits = hidden @ random(VOCABULARY, WIDTH, seed=1).T
    counted = torch.ones(POSITIONS, dtype=torch.bool)
    uniform = ObjectiveArguments("ce", draft_tokens=4)

    def loss(settings, *places):
        only = torch.zeros(POSITIONS, dtype=torch.bool)
        only[list(places)] = True
        rows = slice(0, POSITIONS)
        return view_losses(logits, teacher, rows, only & counted, settings)[0].item()

    decay = replace(uniform, position_weights="decay", position_decay=0.5)
    ratios = [loss(decay, i) / loss(uniform, i) for i in range(8)]
    assert ratios[:4] == pytest.approx([r / 0.46875 for r in (1, 0.5, 0.25, 0.125)])
    assert ratios[4:] == pytest.approx(ratios[:4])


@pytest.mark.parametrize("kind", ["live", "stored"])
def test_p_and_q_are_compared_at_the_temperature_of_the_text(kind):
    temperatures = torch.tensor([0.0, 0.5, 1.0]).repeat(POSITIONS // 3)
    logits = 2 * random(POSITIONS, VOCABULARY, seed=4)
    log_p = logits.log_softmax(-1)
    top = log_p.topk(VOCABULARY)
    teacher = {
        "live": LiveTeacher(logits, matrix(torch.eye(VOCABULARY)), temperatures),
        "stored": StoredTeacher(
            top.indices[:, 0], top.indices, top.values, temperatures
        ),
    }[kind]
    hidden = random(1, POSITIONS, WIDTH)
    head = random(VOCABULARY, WIDTH, seed=1)
    counted = torch.ones(POSITIONS, dtype=torch.bool)
    log_q = (hidden[0] @ head.T).log_softmax(-1)
    greedy = -log_q.gather(-1, log_p.argmax(-1, keepdim=True))[:, 0]
    for name, of_greedy in (("kl", greedy), ("lk_alpha", greedy)):
        loss, _ = multi_view_loss(
            hidden, head, teacher, counted, WEIGHTS[:1], ObjectiveArguments(name), 8
        )
        compare = OBJECTIVES[name]
        halved = compare((2 * log_q).log_softmax(-1), (2 * log_p).log_softmax(-1))
        expected = torch.stack([of_greedy, halved, compare(log_q, log_p)])
        places = torch.arange(POSITIONS)
        torch.testing.assert_close(loss, expected[places % 3, places].mean())


def test_unknown_tokens_are_no_likelier_than_the_last_known_one():
    log_p = (2 * random(POSITIONS, VOCABULARY, seed=4)).log_softmax(-1)
    top = log_p.topk(6)

    def stored_at(temperature: float) -> torch.Tensor:
        temperatures = torch.full((POSITIONS,), temperature)
        teacher = StoredTeacher(
            top.indices[:, 0], top.indices, top.values, temperatures
        )
        return teacher.compare(slice(0, POSITIONS), log_p[None])[1]

    torch.testing.assert_close(stored_at(1.0), top.values)
    exact = (2 * log_p).log_softmax(-1).gather(-1, top.indices)
    known = (2 * top.values).log_softmax(-1)
    assert (stored_at(0.5) <= exact + 1e-5).all()
    assert (stored_at(0.5) < known).all()
    torch.testing.assert_close(stored_at(0.0)[:, 0], torch.zeros(POSITIONS))


def test_a_live_teacher_is_the_target():
    config = models.llama(num_hidden_layers=2)
    target = models.random_model(config)
    tokens = torch.stack([models.random_tokens(20), models.random_tokens(20, seed=1)])
    hidden = last_hidden(target, tokens, 6).flatten(0, 1)
    teacher = LiveTeacher(hidden, target.get_output_embeddings())
    expected = target(tokens).logits[:, -6:].flatten(0, 1).log_softmax(-1)
    _, log_p, _ = teacher.compare(slice(2, 9), torch.zeros(1))
    torch.testing.assert_close(log_p, expected[2:9], rtol=1e-4, atol=1e-5)
    assert torch.equal(teacher.labels(slice(2, 9)), expected[2:9].argmax(-1))


def test_a_stored_teacher_compares_what_was_stored():
    log_p = random(4, VOCABULARY).log_softmax(-1)
    top = log_p.topk(3)
    written = torch.tensor([5, IGNORED, 7, 8])
    teacher = StoredTeacher(written, top.indices, top.values)
    labels = teacher.labels(slice(0, 4))
    assert labels.tolist() == [top.indices[0, 0], IGNORED, *top.indices[2:, 0]]
    q, p, _ = teacher.compare(slice(1, 3), log_p[None, 1:3])
    assert p.shape == (2, 3) and q.shape == (1, 2, 3)
    torch.testing.assert_close(q[0], p)
    assert StoredTeacher(written).labels(slice(0, 4)).tolist() == written.tolist()


def test_dpace_begins_with_what_counts():
    """Positions before it are no drafts: they cannot fail."""
    q = torch.tensor([0.9, 0.2, 0.8, 0.5])
    log_q = torch.stack([q, 1 - q], -1).log()[None]
    labels = torch.tensor([[IGNORED, IGNORED, 0, 0]])
    settings = ObjectiveArguments(position_weights="dpace", draft_tokens=4)
    found = _position_weights(log_q, labels, settings)
    expected = [(0.9 + 0.9 * 0.75) / 4, 0.9 * 0.75 / 4]  # .3937 and .1687
    assert found[0, 2:].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("chunk_tokens", [0, 4])
def test_a_matrix_that_does_not_learn_changes_no_other_gradient(chunk_tokens):
    found = []
    for learns in (True, False):
        hidden = random(VIEWS, POSITIONS, WIDTH).requires_grad_()
        head = random(VOCABULARY, WIDTH, seed=1).requires_grad_(learns)
        counted = torch.ones(POSITIONS, dtype=torch.bool)
        loss, _ = multi_view_loss(
            hidden, head, live(), counted, WEIGHTS, ObjectiveArguments(), chunk_tokens
        )
        loss.backward()
        assert (head.grad is not None) == learns
        found.append(hidden.grad)
    torch.testing.assert_close(*found)
