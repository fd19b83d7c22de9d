"""A head's acceptance is that of its drafts, computed from nothing at every step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.heads import AUX_LAYERS, target_config, write_head
from tests.unit.test_feature_drafter import causal
from vllm_budgetdraft.drafter.feature_checkpoint import load_feature_drafter
from vllm_budgetdraft.evaluation.acceptance import (
    HeldOutAcceptance,
    greedy_continuation,
)

SIZES = {"vocab_size": 12}
NUM_DRAFTS, NEW_TOKENS = 3, 40


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    return models.read_model(models.write_model(folder, target_config(**SIZES), seed=1))


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    return write_head(tmp_path_factory.mktemp("head"), **SIZES, draft_vocab_size=9)


def measure(target, prompts: list[list[int]], budgets: list[int], **changes):
    arguments = {
        "budgets": budgets,
        "temperatures": [0.0],
        "new_tokens": NEW_TOKENS,
        "settings": {"num_speculative_tokens": NUM_DRAFTS, "local_tokens": 8},
    }
    return HeldOutAcceptance(target, {"some": prompts}, **{**arguments, **changes})


def prompts(*lengths: int) -> list[list[int]]:
    return [
        (models.random_tokens(length, seed=length) % SIZES["vocab_size"]).tolist()
        for length in lengths
    ]


@torch.no_grad()
def plain_steps(target, folder: Path, prompt: list[int]) -> list[int]:
    """How many drafts of each step a greedy target would have written itself."""
    head = load_feature_drafter(
        folder,
        max_positions=200,
        embedding=target.get_input_embeddings().weight.detach(),
    )
    written = greedy_continuation(target, prompt, NEW_TOKENS + NUM_DRAFTS + 2)
    text = [*prompt, *written]
    output = target.base_model(torch.tensor([text]), output_hidden_states=True)
    states = torch.cat([output.hidden_states[each][0] for each in AUX_LAYERS], -1)
    features = head.combined(states)
    known, end, steps = len(prompt) + 1, len(prompt) + 1 + NEW_TOKENS, []
    while known < end:
        drafts = plain_drafts(head, text[:known], features[: known - 1])
        accepted = 0
        while accepted < NUM_DRAFTS and drafts[accepted] == text[known + accepted]:
            accepted += 1
        steps.append(accepted)
        known += accepted + 1
    return steps


def plain_drafts(head, context: list[int], features: Tensor) -> list[int]:
    drafts: list[int] = []
    for _ in range(NUM_DRAFTS):
        tokens = torch.tensor([*context, *drafts])[1:]
        hidden, states = head.step(tokens, features, causal(head, len(tokens)))
        drafts.append(int(head.draft_ids[head.logits(hidden[-1]).argmax()]))
        features = torch.cat([features, states[-1:]])
    return drafts


def test_steps_are_those_of_drafts_computed_anew(target, head):
    asked = prompts(1, 2, 30, 61)
    wanted = [plain_steps(target, head, prompt) for prompt in asked]
    assert sum(map(sum, wanted)) >= 10  # some are accepted, and some are not
    (row,) = measure(target, asked, [400]).rows(head)
    steps = [accepted for each in wanted for accepted in each]
    assert row.acceptance_length == 1 + sum(steps) / len(steps)


def test_a_context_that_is_read_again_says_the_same(target, head):
    """The target's cache and states of the first measurement serve the others."""
    asked = prompts(60, 47)
    cases = {"budgets": [24, 64], "temperatures": [0.0, 1.0]}
    together = measure(target, asked, **cases).rows(head)
    alone = [
        row
        for budget in cases["budgets"]
        for row in measure(target, asked, [budget]).rows(head)
    ]
    assert [row for row in together if not row.temperature] == alone
    # Another seed's draws would be others: these are of one proposer.
    drawn = [row for row in together if row.temperature]
    assert all(1 < row.acceptance_length <= 1 + NUM_DRAFTS for row in drawn)


def test_a_budget_is_felt(target, head):
    asked = prompts(150, 140, 130)
    whole, small = measure(target, asked, [200, 16]).rows(head)[::-1]
    assert whole.acceptance_length != small.acceptance_length
