"""Acceptance is measured by the real draft loop against a real target."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from tests.support import models
from tests.support.drafting import build_proposer
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation.acceptance import (
    GreedyVerifier,
    HeldOutAcceptance,
    SamplingVerifier,
    greedy_continuation,
    passages,
    speculate,
)

SIZES = {"vocab_size": 12}
NUM_DRAFTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def target_folder(folder):
    return models.write_model(folder / "target", models.llama(), seed=1)


@pytest.fixture(scope="module")
def target(target_folder):
    return models.read_model(target_folder)


def held_out(target, contexts=(20, 60), num_prompts=3, **changes) -> HeldOutAcceptance:
    texts = {"input_ids": [models.random_tokens(90, seed=i).tolist() for i in range(3)]}
    arguments = {
        "budgets": [64, 24],
        "temperatures": [0.0, 1.0],
        "new_tokens": 24,
        "settings": {"num_speculative_tokens": NUM_DRAFTS, "local_tokens": 8},
    }
    prompts = {each: passages(texts, each, num_prompts, 0) for each in contexts}
    return HeldOutAcceptance(target, prompts, **{**arguments, **changes})


def sampling_verifier(target, context, temperature: float) -> SamplingVerifier:
    cache = DynamicCache()
    target.base_model(context[None, :-1], past_key_values=cache)
    return SamplingVerifier(target, cache, int(context[-1]), temperature, seed=0)


def test_a_target_that_drafts_for_itself_has_everything_accepted(target, target_folder):
    rows = held_out(target, budgets=[64]).rows(target_folder)
    assert [(row.context, row.temperature) for row in rows] == [
        (20, 0.0),
        (20, 1.0),
        (60, 0.0),
        (60, 1.0),
    ]
    for row in rows:
        assert row.acceptance_length == pytest.approx(1 + NUM_DRAFTS, abs=0.15), row
        assert row.acceptance_rate == pytest.approx(1, abs=0.05)


def test_a_smaller_budget_is_a_smaller_cache(target, target_folder):
    rows = held_out(target, contexts=[60], num_prompts=6).rows(target_folder)
    by_budget = {(r.budget, r.temperature): r.acceptance_length for r in rows}
    for temperature in (0.0, 1.0):
        assert by_budget[24, temperature] < by_budget[64, temperature]


def test_the_mean_is_geometric_and_every_case_is_named(target, target_folder):
    found = held_out(target).measure(target_folder)
    mean = found.pop("acceptance_length")
    assert len(found) == 8
    assert "acceptance_length_context_60_budget_24_temperature_1" in found
    product = 1.0
    for length in found.values():
        product *= length
    assert mean == pytest.approx(product ** (1 / 8))


def test_greedy_acceptance_is_what_a_target_that_verifies_says(target, folder):
    drafter = models.write_model(folder / "drafter", models.llama(), seed=2)
    proposer = build_proposer(drafter, draft_sample_method="greedy", kv_budget=400)
    prompt = models.random_tokens(30, seed=5).tolist()
    written = greedy_continuation(target, prompt, 30)
    context = torch.tensor([*prompt, *written])
    assert torch.equal(target(context[None]).logits[0, 29:-1].argmax(-1), context[30:])

    class Live:
        """Feeds the whole context, and chooses the likeliest tokens."""

        def __init__(self):
            self.context = [*prompt, written[0]]

        def __call__(self, drafts, probabilities):
            fed = torch.tensor([[*self.context, *drafts.tolist()]])
            chosen = target(fed).logits[0].argmax(-1)[len(self.context) - 1 :].tolist()
            accepted = 0
            while accepted < len(drafts) and chosen[accepted] == drafts[accepted]:
                accepted += 1
            self.context += chosen[: accepted + 1]
            return accepted, chosen[accepted]

    def steps(verify):
        return speculate(
            proposer,
            [*prompt, written[0]],
            verify,
            new_tokens=20,
            kv_budget=400,
            temperature=0.0,
        )

    assert steps(GreedyVerifier(written[1:])) == steps(Live())


def test_sampling_emits_the_targets_distribution_and_accepts_as_many_as_can_be():
    """Of a target and drafts whose distributions are known."""
    target = models.random_model(models.llama(**SIZES), seed=3)
    context = torch.tensor([3, 1, 4, 1, 5])
    temperature, count = 0.7, 4000
    logits = target(context[None]).logits[0, -1] / temperature
    p = logits.softmax(-1)
    q = (
        logits + 2 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    ).softmax(-1)
    verify = sampling_verifier(target, context, temperature)
    generator = torch.Generator().manual_seed(1)
    counts, accepted_count = torch.zeros(12), 0
    for _ in range(count):
        draft = torch.multinomial(q, 1, generator=generator)
        accepted, following = verify(draft, q[None])
        counts[int(draft) if accepted else following] += 1
        accepted_count += accepted
        verify._cache.crop(4 - verify._cache.get_seq_length())
        verify._last = context[-1:]
    error = (p * (1 - p) / count) ** 0.5
    assert ((counts / count - p).abs() < 4 * error + 1e-4).all()
    alpha = torch.minimum(p, q).sum().item()
    assert accepted_count / count == pytest.approx(alpha, abs=0.03)
    assert alpha < 0.9


def test_the_cache_holds_what_was_accepted_and_no_more(target):
    prompt = models.random_tokens(25, seed=7)
    verify = sampling_verifier(target, prompt, 1.0)
    context, uniform = prompt.tolist(), torch.full((3, models.VOCAB_SIZE), 1.0)
    uniform /= models.VOCAB_SIZE
    for seed in range(6):
        drafts = models.random_tokens(3, seed=seed)
        accepted, following = verify(drafts, uniform)
        context += [*drafts[:accepted].tolist(), following]
        assert verify._cache.get_seq_length() == len(context) - 1
    expected = target(torch.tensor([context])).logits[0, -1]
    found = target(
        verify._last[None], past_key_values=verify._cache, use_cache=True
    ).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_passages_are_of_different_texts_and_the_same_again():
    rows = [list(range(100 * i, 100 * i + 50)) for i in range(4)]
    texts = {"input_ids": [*rows, [1, 2, 3]]}
    found = passages(texts, 20, 4, seed=0)
    assert found == passages(texts, 20, 4, seed=0) != passages(texts, 20, 4, seed=1)
    assert {passage[0] // 100 for passage in found} == {0, 1, 2, 3}
    for passage in found:
        assert passage == list(range(passage[0], passage[0] + 20))
    assert len(passages(texts, 20, 9, seed=0)) == 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_is_an_end_alone_has_no_drafts(
    target, target_folder, temperature
):
    measured = held_out(
        target,
        contexts=[20],
        budgets=[64],
        temperatures=[temperature],
        end_tokens=range(models.VOCAB_SIZE),
    )
    (row,) = measured.rows(target_folder)
    assert row.acceptance_length == 1


@pytest.mark.parametrize("position", [1, 6])
def test_steps_after_an_end_are_not_counted(target, target_folder, position):
    """Its own drafter has all of its drafts accepted, NUM_DRAFTS and one a step."""
    prompt = models.random_tokens(20, seed=3).tolist()
    written = greedy_continuation(target, prompt, 40)
    end = written[position]
    position = written.index(end, 1)  # a token may come again
    proposer = build_proposer(target_folder, kv_budget=64)
    steps = speculate(
        proposer,
        [*prompt, written[0]],
        GreedyVerifier(written[1:]),
        new_tokens=24,
        kv_budget=64,
        temperature=0.0,
        end_tokens=[end],
    )
    assert len(steps) == -(-position // (NUM_DRAFTS + 1)) < 6


def test_texts_shorter_than_a_context_are_an_error(target):
    with pytest.raises(ConfigurationError, match="no held-out text .* 4000 tokens"):
        held_out(target, contexts=[4000])
