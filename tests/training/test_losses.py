import math

import pytest
import torch

from tests.support import models
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.training.arguments import ViewArguments
from vllm_budgetdraft.training.losses import IGNORED, agreement, ce_loss, kl_loss
from vllm_budgetdraft.training.trainer import MultiViewLoss
from vllm_budgetdraft.training.views import continuation_hidden, read_prefix

# Two positions of one sequence, three tokens; probabilities, so that hands can count.
DRAFTER = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]).log()
TARGET = torch.tensor([[[0.25, 0.5, 0.25], [0.0625, 0.875, 0.0625]]]).log()


LABELS = TARGET.argmax(-1)


def test_ce_is_minus_log_of_what_the_drafter_gives_the_targets_choice():
    by_hand = -(math.log(0.25) + math.log(0.8)) / 2
    assert ce_loss(DRAFTER, LABELS).item() == pytest.approx(by_hand, rel=1e-6)


def test_kl_goes_from_the_target_to_the_drafter_and_is_a_mean_over_positions():
    first = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    second = 0.875 * math.log(0.875 / 0.8) + 0.125 * math.log(0.0625 / 0.1)
    by_hand = (first + second) / 2
    assert kl_loss(DRAFTER, TARGET).item() == pytest.approx(by_hand, rel=1e-5)


def test_constants_added_to_the_logits_change_no_loss():
    torch.testing.assert_close(ce_loss(DRAFTER + 3, LABELS), ce_loss(DRAFTER, LABELS))
    torch.testing.assert_close(
        kl_loss(DRAFTER + 3, TARGET - 5), kl_loss(DRAFTER, TARGET)
    )


def test_kl_of_equal_distributions_is_zero():
    assert kl_loss(TARGET, TARGET).item() == pytest.approx(0.0, abs=1e-7)


def test_agreement_is_the_share_of_equal_choices():
    assert agreement(DRAFTER, LABELS).item() == 0.5


def test_positions_without_a_label_count_for_nothing():
    labels = LABELS.clone()
    labels[0, 0] = IGNORED
    assert ce_loss(DRAFTER, labels).item() == pytest.approx(-math.log(0.8), rel=1e-6)
    assert agreement(DRAFTER, labels).item() == 1.0


@pytest.fixture
def drafter(drafter_folder):
    drafter = load_drafter(drafter_folder, max_positions=256)
    return drafter.train().requires_grad_(True)


@pytest.fixture(scope="module")
def target():
    return models.random_model(models.llama(num_hidden_layers=2), seed=1)


PREFIX_TOKENS = 120
TOKENS = models.random_tokens(2 * 150).view(2, 150)
PREFIX, CONTINUATION = TOKENS[:, :PREFIX_TOKENS], TOKENS[:, PREFIX_TOKENS:]


def multi_view_loss(drafter, target, **changes) -> torch.Tensor:
    views = ViewArguments(**{"budget_weights": [1.0], **changes})
    return MultiViewLoss(drafter, target, views, EvictionSettings())(
        PREFIX, CONTINUATION
    )["loss"]


def view_losses(drafter, target, objective: str, budget: int) -> tuple[float, float]:
    """L_A and L_C, put together from their parts."""
    target_logits = target(TOKENS).logits[:, PREFIX_TOKENS:]
    full = read_prefix(drafter, PREFIX, make_policy(EvictionSettings()))
    losses = []
    for view in (full, full.sparse(make_policy(EvictionSettings()), budget)):
        hidden = continuation_hidden(drafter, CONTINUATION, PREFIX_TOKENS, view)
        logits = drafter.logits(hidden)
        if objective == "ce":
            losses.append(ce_loss(logits, target_logits.argmax(-1)).item())
        else:
            losses.append(kl_loss(logits, target_logits).item())
    return losses[0], losses[1]


@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_the_loss_is_that_of_the_full_view_plus_the_weighted_one_of_the_sparse(
    drafter, target, objective
):
    full, sparse = view_losses(drafter, target, objective, budget=64)
    assert abs(full - sparse) > 1e-3, "both views say the same"
    loss = multi_view_loss(
        drafter, target, objective=objective, budgets=[64], sparse_weight=0.3
    )
    assert loss.item() == pytest.approx(full + 0.3 * sparse, rel=1e-5)


@pytest.mark.parametrize("budget", [PREFIX_TOKENS, 512])
def test_a_budget_that_holds_the_prefix_adds_no_sparse_loss(drafter, target, budget):
    full, _ = view_losses(drafter, target, "ce", budget)
    loss = multi_view_loss(drafter, target, budgets=[budget], sparse_weight=100.0)
    assert loss.item() == pytest.approx(full, rel=1e-5)


def test_labels_known_beforehand_take_the_place_of_the_targets_own_pass(
    drafter, target
):
    views = ViewArguments(budgets=[64], budget_weights=[1.0])
    module = MultiViewLoss(drafter, target, views, EvictionSettings())
    labels = target(TOKENS).logits[:, PREFIX_TOKENS:].argmax(-1)
    known = module(PREFIX, CONTINUATION, labels)["loss"]
    torch.testing.assert_close(known, module(PREFIX, CONTINUATION)["loss"])
    others = module(PREFIX, CONTINUATION, (labels + 1) % models.VOCAB_SIZE)["loss"]
    assert abs(known - others) > 0.1


def test_the_target_gets_no_gradients_and_is_no_part_of_what_is_saved(drafter, target):
    views = ViewArguments(budgets=[64], budget_weights=[1.0])
    module = MultiViewLoss(drafter, target, views, EvictionSettings())
    module(PREFIX, CONTINUATION)["loss"].backward()
    assert all(p.grad is None for p in target.parameters())
    assert {id(p) for p in module.parameters()} == {id(p) for p in drafter.parameters()}
    assert all(p.grad is not None for p in drafter.parameters())


def test_a_budget_too_small_for_the_policy_is_refused(drafter, target):
    with pytest.raises(ConfigurationError, match=r"budgets=\[64, 15\].*16.*raise"):
        multi_view_loss(drafter, target, budgets=[64, 15], budget_weights=[0.5, 0.5])
