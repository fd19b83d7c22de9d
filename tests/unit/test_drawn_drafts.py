"""Drafts from the drafter's softmax: what they are drawn from, and how."""

import pytest
import torch

from tests.support.drafting import Requests, build_proposer
from tests.support.models import VOCAB_SIZE
from vllm_budgetdraft.proposer.picking import Drafts

NUM_DRAFTS = 3


def started(folder, prompt_tokens: list[int], **settings) -> Requests:
    proposer = build_proposer(
        folder,
        num_slots=len(prompt_tokens),
        eviction_policy="keep_all",
        num_speculative_tokens=NUM_DRAFTS,
        **settings,
    )
    requests = Requests(proposer)
    for slot, num_tokens in enumerate(prompt_tokens):
        requests.start(slot, num_tokens, seed=num_tokens)
    return requests


def drawn(requests: Requests, temperatures: list[float]) -> Drafts:
    return requests.drafts(list(requests.contexts), None, temperatures)


def test_tokens_are_drawn_from_the_drafters_softmax_at_each_temperature(
    drafter_folder, hugging_face_drafter
):
    requests, temperatures = started(drafter_folder, [5, 60, 23]), [0.5, 1.0, 3.0]
    for _ in range(3):
        tokens, confidences, probabilities = drawn(requests, temperatures)
        assert probabilities.shape == (3, NUM_DRAFTS, VOCAB_SIZE)
        for slot, temperature in enumerate(temperatures):
            drafts = tokens[slot].tolist()
            fed = torch.tensor([requests.contexts[slot] + drafts[:-1]])
            with torch.inference_mode():
                logits = hugging_face_drafter(fed).logits[0, -NUM_DRAFTS:]
            expected = (logits / temperature).softmax(-1)
            torch.testing.assert_close(
                probabilities[slot], expected, rtol=1e-3, atol=1e-5
            )
            torch.testing.assert_close(
                confidences[slot], expected.amax(-1), rtol=1e-3, atol=1e-5
            )
            requests.verify(slot, drafts)


def test_rows_without_a_temperature_pick_the_likeliest_and_give_it_all_probability(
    drafter_folder,
):
    greedy = started(drafter_folder, [5, 60, 23]).drafts([0, 1, 2])
    assert greedy.probabilities is None
    requests = started(drafter_folder, [5, 60, 23])
    tokens, confidences, probabilities = drawn(requests, [0.0, 2.0, 0.0])
    one_hot = torch.nn.functional.one_hot(tokens, VOCAB_SIZE).float()
    for slot in (0, 2):
        assert tokens[slot].tolist() == greedy.tokens[slot].tolist()
        assert torch.equal(probabilities[slot], one_hot[slot])
        torch.testing.assert_close(confidences[slot], greedy.confidences[slot])
    assert not torch.equal(probabilities[1], one_hot[1])
    assert requests.drafts([0, 1, 2]).probabilities is None


def test_each_token_is_as_frequent_as_it_is_probable_whatever_was_drawn_before(
    drafter_folder,
):
    """Of 64 rows of one context, drawn 40 times over."""
    requests, repeats = started(drafter_folder, [7] * 64), 40
    surplus = variance = torch.zeros(NUM_DRAFTS, VOCAB_SIZE)
    num_different = 0
    for _ in range(repeats):
        tokens, _, probabilities = drawn(requests, [1.0] * 64)
        chosen = torch.nn.functional.one_hot(tokens, VOCAB_SIZE)
        surplus = surplus + (chosen - probabilities).sum(0)
        variance = variance + (probabilities * (1 - probabilities)).sum(0)
        num_different += len(set(map(tuple, tokens.tolist())))
    likely = variance > 25
    assert (likely.sum(1) >= 3).all(), "too few tokens are likely enough to tell"
    assert (surplus / variance.sqrt())[likely].abs().max() < 4.5
    # Rows and calls have each their own noise.
    assert num_different > repeats * 32


def test_draws_are_those_of_the_seed_and_touch_no_other_generator(drafter_folder):
    def history(seed: int) -> list[list[list[int]]]:
        requests = started(drafter_folder, [5, 60, 23], seed=seed)
        drafts = [drawn(requests, [1.0] * 3).tokens.tolist() for _ in range(5)]
        assert len({str(each) for each in drafts}) == 5
        return drafts

    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = history(seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert history(seed=7) == one
    assert history(seed=8) != one


def test_a_greedy_proposer_has_no_room_for_distributions(drafter_folder):
    greedy = started(drafter_folder, [5, 60], draft_sample_method="greedy").proposer
    both = started(drafter_folder, [5, 60]).proposer
    num_bytes = 2 * NUM_DRAFTS * VOCAB_SIZE * 4
    assert both.scratch_bytes - greedy.scratch_bytes == num_bytes


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_a_shorter_draft_comes_with_as_many_distributions(drafter_folder, num_drafts):
    requests = started(drafter_folder, [5, 60])
    drafts = requests.drafts([1, 0], num_drafts, [1.0, 0.0])
    assert drafts.tokens.shape == (2, num_drafts)
    assert drafts.probabilities.shape == (2, num_drafts, VOCAB_SIZE)
    torch.testing.assert_close(drafts.probabilities.sum(-1), torch.ones(2, num_drafts))
