"""The loss is that of its parts, and asks the target only if it must."""

import random

import pytest
import torch

from tests.support import models
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.training.arguments import ObjectiveArguments, ViewArguments
from vllm_budgetdraft.training.model import MultiViewModel
from vllm_budgetdraft.training.objectives import OBJECTIVES
from vllm_budgetdraft.training.teacher_cache import TeacherCache
from vllm_budgetdraft.training.views import PrefixViews, continuation_hidden

PREFIX_TOKENS, CONTINUATION_TOKENS = 120, 32
WINDOW = PREFIX_TOKENS + CONTINUATION_TOKENS
TOKENS = models.random_tokens(2 * WINDOW).view(2, WINDOW)
PREFIX, CONTINUATION = TOKENS[:, :PREFIX_TOKENS], TOKENS[:, PREFIX_TOKENS:]
WINDOWS = torch.tensor([2, 5])
COUNTED = torch.ones_like(CONTINUATION, dtype=torch.bool)


@pytest.fixture
def drafter(drafter_folder):
    drafter = load_drafter(drafter_folder, max_positions=256)
    return drafter.train().requires_grad_(True)


@pytest.fixture(scope="module")
def target():
    return models.random_model(models.llama(num_hidden_layers=2), seed=1)


def model_of(
    drafter,
    target,
    objective="ce",
    cache=None,
    teacher="stored",
    match_temperature=True,
    **views,
) -> MultiViewModel:
    views = {"budgets": [64], "budget_weights": [1.0], **views}
    return MultiViewModel(
        drafter,
        target,
        ViewArguments(**views),
        ObjectiveArguments(
            objective=objective, teacher=teacher, match_temperature=match_temperature
        ),
        ViewSettings(),
        cache,
    )


def loss(model: MultiViewModel, **more) -> torch.Tensor:
    return model(WINDOWS, PREFIX, CONTINUATION, COUNTED, **more)["loss"]


def losses_by_parts(drafter, target, objective: str, budgets: list[int]) -> list[float]:
    """L_A, and L_C of each budget."""
    log_p = target(TOKENS).logits[:, PREFIX_TOKENS:].log_softmax(-1)
    found = PrefixViews(
        drafter,
        make_policy(ViewSettings()),
        PREFIX,
        ViewSettings(),
        continuation_tokens=CONTINUATION_TOKENS,
    )
    losses = []
    for view in (found.full(), *map(found.sparse, budgets)):
        (hidden,) = continuation_hidden(drafter, CONTINUATION, [view])
        log_q = drafter.logits(hidden).log_softmax(-1)
        if objective == "ce":
            each = -log_q.gather(-1, log_p.argmax(-1, keepdim=True))
        else:
            each = OBJECTIVES[objective](log_q, log_p)
        losses.append(each.mean().item())
    return losses


@pytest.mark.parametrize("objective", ["ce", *OBJECTIVES])
def test_the_loss_is_that_of_the_full_view_plus_the_weighted_one_of_the_sparse(
    drafter, target, objective
):
    full, sparse = losses_by_parts(drafter, target, objective, [64])
    assert abs(full - sparse) > 1e-4, "both views say the same"
    model = model_of(drafter, target, objective, sparse_weight=0.3)
    assert loss(model).item() == pytest.approx(full + 0.3 * sparse, rel=1e-4)
    assert model.metrics["losses_budget_64"] == pytest.approx(sparse, rel=1e-4)


def test_several_sparse_views_count_as_their_mean(drafter, target):
    full, *sparse = losses_by_parts(drafter, target, "kl", [64, 32])
    weights = {"budgets": [64, 32], "budget_weights": [0.5, 0.5]}
    model = model_of(drafter, target, "kl", views_per_step=2, **weights)
    expected = full + 0.5 * sum(sparse) / 2
    assert loss(model).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("budget", [PREFIX_TOKENS, 512])
def test_a_budget_that_holds_the_prefix_adds_no_sparse_loss(drafter, target, budget):
    (full,) = losses_by_parts(drafter, target, "ce", [])
    model = model_of(drafter, target, budgets=[budget], sparse_weight=100.0)
    assert loss(model).item() == pytest.approx(full, rel=1e-4)


def test_without_a_weight_nothing_sparse_is_computed(drafter, target):
    model = model_of(drafter, target, sparse_weight=0.0)
    (full,) = losses_by_parts(drafter, target, "ce", [])
    assert loss(model).item() == pytest.approx(full, rel=1e-4)
    assert set(model.metrics) == {
        f"{name}_full" for name in ("losses", "agreements", "acceptances")
    }


def test_budgets_are_drawn_as_often_as_their_weights_say(drafter, target):
    budgets, weights = [32, 48, 64, 96], [0.4, 0.3, 0.2, 0.1]
    views = {"budgets": budgets, "budget_weights": weights}
    random.seed(0)
    model = model_of(drafter, target, **views)
    drawn = [budget for _ in range(4000) for budget in model._draw_budgets()]
    for budget, weight in zip(budgets, weights, strict=True):
        assert drawn.count(budget) / 4000 == pytest.approx(weight, abs=0.03)
    together = model_of(drafter, target, views_per_step=3, **views)
    for _ in range(50):
        assert len(set(together._draw_budgets())) == 3


def stored(target, size: int) -> dict[str, torch.Tensor]:
    log_p = target(TOKENS).logits[:, PREFIX_TOKENS:].log_softmax(-1)
    top = log_p.topk(size)
    return {
        "next_ids": top.indices[..., -1],
        "top_ids": top.indices,
        "top_logprobs": top.values,
    }


@pytest.mark.parametrize("objective", ["ce", *OBJECTIVES])
def test_what_was_stored_takes_the_place_of_the_targets_own_pass(
    drafter, target, objective, monkeypatch
):
    expected = loss(model_of(drafter, target, objective))
    known = stored(target, models.VOCAB_SIZE)
    model = model_of(drafter, target, objective)
    monkeypatch.setattr(target.base_model, "forward", None)  # it must not be asked
    torch.testing.assert_close(loss(model, **known), expected, rtol=1e-3, atol=1e-5)


def test_a_distribution_that_was_not_stored_is_asked_for(drafter, target):
    written = {"next_ids": torch.zeros_like(CONTINUATION)}
    model = model_of(drafter, target, "kl")
    assert torch.equal(loss(model, **written), loss(model_of(drafter, target, "kl")))
    # But the hard label is the token that was written.
    by_label = loss(model_of(drafter, target, "ce"), **written)
    assert abs(by_label - loss(model_of(drafter, target, "ce"))) > 0.01


def test_a_target_that_is_to_be_asked_is_asked(drafter, target):
    few = stored(target, 3)
    whole = loss(model_of(drafter, target, "kl"))
    live = model_of(drafter, target, "kl", teacher="live")
    assert torch.equal(loss(live, **few), whole)
    assert abs(loss(model_of(drafter, target, "kl"), **few) - whole) > 0.01


@pytest.mark.parametrize("teacher", ["stored", "live"])
def test_greedy_text_is_learnt_by_its_labels_if_temperatures_are_to_match(
    drafter, target, teacher
):
    known = stored(target, models.VOCAB_SIZE)
    greedy = {"temperatures": torch.zeros(CONTINUATION.shape)}
    by_label = loss(model_of(drafter, target, "ce"))
    matched = model_of(drafter, target, "kl", teacher=teacher)
    torch.testing.assert_close(loss(matched, **known, **greedy), by_label)
    other = model_of(drafter, target, "kl", teacher=teacher, match_temperature=False)
    assert torch.equal(loss(other, **known, **greedy), loss(other, **known))


def cache_of(folder, **windows) -> TeacherCache:
    windows = {"target": "a", "seed": 0, **windows}
    return TeacherCache(
        folder,
        num_windows=8,
        positions=CONTINUATION_TOKENS,
        width=models.SIZES["hidden_size"],
        windows=windows,
    )


def test_a_target_is_asked_once_about_a_window(drafter, target, tmp_path, monkeypatch):
    first = model_of(drafter, target, "kl", cache=cache_of(tmp_path))
    expected = loss(first)
    monkeypatch.setattr(target.base_model, "forward", None)  # it must not be asked
    again = model_of(drafter, target, "kl", cache=cache_of(tmp_path))
    # Which is rounded to bfloat16, as targets are.
    torch.testing.assert_close(loss(again), expected, rtol=0.01, atol=1e-3)
    with pytest.raises(TypeError):
        again(WINDOWS + 1, PREFIX, CONTINUATION, COUNTED)


def test_a_cache_grows_and_keeps_what_it_has(tmp_path):
    hidden = torch.randn(2, CONTINUATION_TOKENS, models.SIZES["hidden_size"])
    cache = cache_of(tmp_path)
    assert cache.read(WINDOWS) is None
    cache.write(WINDOWS, hidden)
    longer = TeacherCache(
        tmp_path,
        num_windows=100,
        positions=CONTINUATION_TOKENS,
        width=models.SIZES["hidden_size"],
        windows={"target": "a", "seed": 0},
    )
    assert torch.equal(longer.read(WINDOWS.flip(0)), hidden.flip(0).bfloat16())
    assert longer.read(torch.tensor([2, 99])) is None


def test_a_cache_of_other_windows_is_refused(tmp_path):
    cache_of(tmp_path)
    with pytest.raises(ConfigurationError, match="seed=0, not 1; name another"):
        cache_of(tmp_path, seed=1)


def test_what_does_not_count_changes_nothing(drafter, target):
    counted = COUNTED.clone()
    counted[:, 20:] = False
    changed = CONTINUATION.clone()
    changed[:, 20:] = 3
    model = model_of(drafter, target, "kl")
    some = model(WINDOWS, PREFIX, CONTINUATION, counted)["loss"]
    again = model(WINDOWS, PREFIX, changed, counted)["loss"]
    torch.testing.assert_close(again, some)


def test_the_target_gets_no_gradients_and_is_no_part_of_what_is_saved(drafter, target):
    model = model_of(drafter, target)
    loss(model).backward()
    assert all(p.grad is None for p in target.parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for p in drafter.parameters()}
    assert all(p.grad is not None for p in drafter.parameters())


def test_a_budget_too_small_for_the_policy_is_refused(drafter, target):
    with pytest.raises(ConfigurationError, match=r"budgets=\[64, 15\].*16.*raise"):
        model_of(drafter, target, budgets=[64, 15], budget_weights=[0.5, 0.5])


def test_a_target_that_changes_its_logits_is_refused(drafter, target):
    target.config.final_logit_softcapping = 30.0
    try:
        with pytest.raises(ConfigurationError, match="softcapping=30"):
            model_of(drafter, target)
    finally:
        del target.config.final_logit_softcapping
