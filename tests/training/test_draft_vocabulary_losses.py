"""Objectives of drafters that draft a part of the vocabulary."""

from math import exp, log

import pytest
import torch
from torch import Tensor

from tests.training.test_losses import (
    POSITION_WEIGHTS,
    POSITIONS,
    VIEWS,
    VOCABULARY,
    WEIGHTS,
    WIDTH,
    live,
    matrix,
    random,
    stored,
)
from vllm_budgetdraft.training.arguments import ObjectiveArguments
from vllm_budgetdraft.training.draft_vocabulary import DraftVocabulary
from vllm_budgetdraft.training.losses import ViewMeans, multi_view_loss
from vllm_budgetdraft.training.objectives import IGNORED, OBJECTIVES, OUTSIDE
from vllm_budgetdraft.training.teacher import LiveTeacher, StoredTeacher, Teacher

every_objective = pytest.mark.parametrize("objective", ["ce", *OBJECTIVES])
every_path = pytest.mark.parametrize("chunk_tokens", [0, 4])
every_teacher = pytest.mark.parametrize("kind", ["live", "stored"])

# Four of six tokens are drafted. Of positions 0 to 3, the third is not counted, and the
# target's likeliest token of the second is not drafted.
IDS = torch.tensor([4, 0, 2, 5])
P = torch.tensor(
    [
        [0.40, 0.10, 0.10, 0.10, 0.20, 0.10],
        [0.05, 0.50, 0.10, 0.25, 0.05, 0.05],
        [0.70, 0.10, 0.05, 0.05, 0.05, 0.05],
        [0.10, 0.05, 0.60, 0.05, 0.10, 0.10],
    ]
)
#: In the order of ``IDS``.
Q = torch.tensor(
    [
        [0.20, 0.30, 0.25, 0.25],
        [0.70, 0.10, 0.10, 0.10],
        [0.40, 0.20, 0.20, 0.20],
        [0.10, 0.10, 0.70, 0.10],
    ]
)
COUNTED = torch.tensor([True, True, False, True])
#: What is known of p on the vocabulary, with q of the same tokens: (p, q).
KNOWN = {
    "live": [
        [(0.2, 0.2), (0.4, 0.3), (0.1, 0.25), (0.1, 0.25)],
        [(0.05, 0.7), (0.05, 0.1), (0.1, 0.1), (0.05, 0.1)],
        [(0.1, 0.1), (0.1, 0.1), (0.6, 0.7), (0.1, 0.1)],
    ],
    # Of three tokens: 0, 4 and 1; 1, 3 and 2; 2, 0 and 5.
    "stored": [
        [(0.4, 0.3), (0.2, 0.2)],
        [(0.1, 0.1)],
        [(0.6, 0.7), (0.1, 0.1), (0.1, 0.1)],
    ],
}
#: Of p that is or may be on the vocabulary: all but tokens 1 and 3, if these are known.
SHARES = {"live": [0.8, 0.25, 0.9], "stored": [0.9, 0.25, 1.0]}
TOPS = torch.tensor([[0, 4, 1], [1, 3, 2], [0, 1, 2], [2, 0, 5]])


def teacher_of(kind: str) -> Teacher:
    vocabulary = DraftVocabulary(IDS, 6)
    if kind == "live":
        return LiveTeacher(P.log(), matrix(torch.eye(6)), vocabulary=vocabulary)
    written = TOPS[:, 0].where(COUNTED, IGNORED)
    tops = P.gather(1, TOPS).log()
    return StoredTeacher(written, TOPS, tops, vocabulary=vocabulary)


def loss_of(
    teacher: Teacher, settings: ObjectiveArguments, chunk_tokens: int
) -> tuple[float, ViewMeans, Tensor]:
    """Of one view with the q above, with its gradient in the logits."""
    logits = Q.log()[None].requires_grad_()
    loss, means = multi_view_loss(
        logits, torch.eye(4), teacher, COUNTED, torch.ones(1), settings, chunk_tokens
    )
    loss.backward()
    return loss.item(), means, logits.grad[0]


def kl(pairs, share):
    return sum(p / share * log(p / share / q) for p, q in pairs)


def alpha(pairs):
    return sum(min(pair) for pair in pairs)


@every_teacher
@every_path
@every_objective
def test_losses_are_those_that_hands_count(objective, chunk_tokens, kind):
    first, second, last = KNOWN[kind]
    alphas = [alpha(first), alpha(second), alpha(last)]
    # The second position's label is not drafted, and KL would learn from what is left.
    kls = [kl(first, SHARES[kind][0]), 0, kl(last, SHARES[kind][2])]
    weights = [exp(-3 * each) for each in alphas]
    expected = {
        "ce": (-log(0.3) - log(0.7)) / 2,
        "kl": (kls[0] + kls[2]) / 2,
        "tv": sum(1 - each for each in alphas) / 3,
        "lk_alpha": sum(-log(each) for each in alphas) / 3,
        "lk_hybrid": sum(
            w * k + (1 - w) * (1 - a)
            for w, k, a in zip(weights, kls, alphas, strict=True)
        )
        / 3,
    }[objective]
    settings = ObjectiveArguments(objective, draft_tokens=4)
    found, means, _ = loss_of(teacher_of(kind), settings, chunk_tokens)
    assert found == pytest.approx(expected, rel=1e-5)
    assert means.losses.tolist() == [pytest.approx(expected, rel=1e-5)]
    assert means.agreements.tolist() == [pytest.approx(2 / 3)]
    assert means.label_coverage.item() == pytest.approx(2 / 3)
    if objective == "ce":
        assert means.coverage is None
        return
    assert means.acceptances.tolist() == [pytest.approx(sum(alphas) / 3, rel=1e-5)]
    mass = sum(p for pairs in KNOWN[kind] for p, _ in pairs)
    assert means.coverage.item() == pytest.approx(mass / 3, rel=1e-5)


def test_the_numbers_of_hands_are_these():
    """Once without any formula."""
    assert [alpha(each) for each in KNOWN["live"]] == pytest.approx([0.7, 0.25, 0.9])
    assert [alpha(each) for each in KNOWN["stored"]] == pytest.approx([0.5, 0.1, 0.8])
    found, _, _ = loss_of(teacher_of("live"), ObjectiveArguments("tv"), 0)
    assert found == pytest.approx((0.3 + 0.75 + 0.1) / 3)
    found, _, _ = loss_of(teacher_of("live"), ObjectiveArguments("kl"), 0)
    assert found == pytest.approx((0.1379119 + 0.0025934) / 2, rel=1e-4)


@every_path
def test_the_gradient_of_kl_is_q_less_p_of_the_vocabulary(chunk_tokens):
    _, _, found = loss_of(teacher_of("live"), ObjectiveArguments("kl"), chunk_tokens)
    expected = torch.zeros(4, 4)
    expected[0] = Q[0] - torch.tensor([0.25, 0.5, 0.125, 0.125])
    expected[3] = Q[3] - torch.tensor([1, 1, 6, 1]) / 9
    torch.testing.assert_close(found, expected / 2)


@every_path
def test_weights_of_a_draft_know_that_a_label_is_never_drafted(chunk_tokens):
    """Of drafts of two: s is .65 and .5, and 1, of what is not counted, and .85."""
    given = ObjectiveArguments("ce", "dpace", draft_tokens=2)
    first, last = (0.65 + 0.65 * 0.5) / 2, (1 * 0.85) / 2
    expected = (-first * log(0.3) - last * log(0.7)) / 2
    found, _, _ = loss_of(teacher_of("live"), given, chunk_tokens)
    assert found == pytest.approx(expected, rel=1e-5)


def loss_and_gradients(teacher, settings, chunk_tokens, ids):
    hidden = random(VIEWS, POSITIONS, WIDTH).requires_grad_()
    head = random(VOCABULARY, WIDTH, seed=1).requires_grad_()
    rows = head if ids is None else head.index_select(0, ids)
    counted = torch.arange(POSITIONS) % 5 != 2
    loss, means = multi_view_loss(
        hidden, rows, teacher, counted, WEIGHTS, settings, chunk_tokens
    )
    (3 * loss).backward()
    return loss.detach(), *means[:3], hidden.grad, head.grad


def with_vocabulary(kind: str, ids: Tensor | None) -> Teacher:
    teacher = live() if kind == "live" else stored()
    if ids is None:
        return teacher
    vocabulary = DraftVocabulary(ids, VOCABULARY)
    if isinstance(teacher, LiveTeacher):
        teacher.vocabulary = vocabulary
        return teacher
    tops = teacher.top_ids, teacher.top_log_probs
    return StoredTeacher(teacher.next_tokens, *tops, vocabulary=vocabulary)


@every_teacher
@pytest.mark.parametrize("position_weights", POSITION_WEIGHTS)
@every_objective
def test_a_vocabulary_of_all_tokens_changes_nothing(objective, position_weights, kind):
    settings = ObjectiveArguments(objective, position_weights, draft_tokens=4)
    generator = torch.Generator().manual_seed(0)
    every = torch.randperm(VOCABULARY, generator=generator)
    for chunk_tokens in (0, 4):
        expected, found = (
            loss_and_gradients(with_vocabulary(kind, ids), settings, chunk_tokens, ids)
            for ids in (None, every)
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@every_teacher
@pytest.mark.parametrize("position_weights", POSITION_WEIGHTS)
@every_objective
def test_in_chunks_it_is_the_same(objective, position_weights, kind):
    """Although each chunk has labels outside, and how many shows in the end."""
    settings = ObjectiveArguments(objective, position_weights, draft_tokens=4)
    ids = torch.arange(0, VOCABULARY, 2)
    whole, chunks, few = (
        loss_and_gradients(with_vocabulary(kind, ids), settings, chunk_tokens, ids)
        for chunk_tokens in (0, 4, 16)
    )
    for found in (chunks, few):
        for ours, theirs in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    of_head = whole[-1]
    assert not of_head[1::2].any() and of_head[::2].all()


@every_path
@every_teacher
@pytest.mark.parametrize("temperature", [None, 0.0, 0.5])
@every_objective
def test_where_all_of_p_is_elsewhere_nothing_is_learnt(
    objective, temperature, kind, chunk_tokens
):
    """As of greedy text whose next token is not drafted."""
    vocabulary = DraftVocabulary(torch.tensor([1, 3]), 6)
    at = None if temperature is None else torch.full((4,), temperature)
    p = torch.tensor([[1.0, 0, 0.6, 0, 0, 0.4]]).repeat(4, 1)
    teacher: Teacher
    if kind == "live":
        logits = p.log().clamp_min(-1e4)
        teacher = LiveTeacher(logits, matrix(torch.eye(6)), at, vocabulary)
    else:
        ids = torch.tensor([[0, 2, 5]]).repeat(4, 1)
        log_p = torch.tensor([0.5, 0.3, 0.2]).log().repeat(4, 1)
        teacher = StoredTeacher(ids[:, 0], ids, log_p, at, vocabulary)
    logits = random(1, 4, 2).requires_grad_()
    loss, means = multi_view_loss(
        *(logits, torch.eye(2), teacher, torch.ones(4).bool(), torch.ones(1)),
        *(ObjectiveArguments(objective, draft_tokens=4), chunk_tokens),
    )
    loss.backward()
    assert loss.item() == pytest.approx(1.0 if objective == "tv" else 0.0, abs=1e-6)
    assert not logits.grad.any()
    assert not means.agreements.any() and not means.acceptances.any()
    assert means.label_coverage == 0


def test_a_vocabulary_knows_the_places_of_its_tokens():
    tokens = torch.tensor([[5, 1], [IGNORED, 4]])
    found = DraftVocabulary(IDS, 6).labels(tokens)
    assert found.tolist() == [[3, OUTSIDE], [IGNORED, 0]]


def test_without_a_vocabulary_nothing_is_told_of_it():
    _, means = multi_view_loss(
        *(random(1, 4, 6), torch.eye(6), LiveTeacher(P.log(), matrix(torch.eye(6)))),
        *(COUNTED, torch.ones(1), ObjectiveArguments("kl"), 4),
    )
    assert means.label_coverage is None and means.coverage is None
