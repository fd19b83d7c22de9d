"""Reference decoding: whatever is drafted, outputs are those of the target alone."""

import pytest
import torch

from tests.support import models
from tests.support.distributions import joint, next_logits, p_value, probabilities
from tests.support.flex_twin import random_drafter, random_target
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation.acceptance import greedy_continuation, passages
from vllm_budgetdraft.evaluation.flexdraft_acceptance import FlexDraftAcceptance
from vllm_budgetdraft.flexdraft.checkpoint import fingerprint, save_flexdraft
from vllm_budgetdraft.flexdraft.decoding import TRIALS, FlexDecoder, ModeSwitch
from vllm_budgetdraft.flexdraft.pages import PageSelector

NUM_DRAFTS = 4
#: Of 5 tokens, so that drafts are often right by chance.
SMALL = {"vocab_size": 5, "eos_token_id": None, "bos_token_id": None}
SELECTOR = PageSelector(EvictionSettings(sink_tokens=3, local_tokens=4), 4)


@pytest.fixture(scope="module")
def target():
    return random_target(**SMALL)


def decoder(target, **changes) -> FlexDecoder:
    settings = {"num_drafts": NUM_DRAFTS, "confidence_threshold": 0.0}
    return FlexDecoder(target, random_drafter(target), **{**settings, **changes})


def prompts(count: int) -> list[list[int]]:
    lengths = (40, 3, 1, 22, 9, 35, 2, 17)
    return [(models.random_tokens(n, seed=n) % 5).tolist() for n in lengths[:count]]


@pytest.mark.parametrize("mode", ["sequential", "parallel", "auto"])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selector": SELECTOR, "kv_budget": 16},
        {"confidence_threshold": 0.2},
    ],
    ids=["all", "budget", "confidence"],
)
def test_greedy_output_is_the_targets(target, mode, count, settings):
    decoding = decoder(target, **settings)
    written = decoding.generate(prompts(count), 30, mode=mode)
    for prompt, tokens in zip(prompts(count), written, strict=True):
        assert tokens == greedy_continuation(target, prompt, 30)
    accepted = [count for row in decoding.accepted for count in row]
    assert sum(accepted) > 0
    if count > 1:
        assert len(set(map(len, decoding.accepted))) > 1, "rows go on alike"


def test_a_threshold_verifies_less(target):
    every, some = decoder(target), decoder(target, confidence_threshold=0.2)
    for each in (every, some):
        each.generate(prompts(8), 30, mode="sequential")
    means = [
        sum(map(sum, each.accepted)) / sum(map(len, each.accepted))
        for each in (every, some)
    ]
    assert means[1] < means[0]


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_samples_have_the_targets_distribution(target, mode, threshold):
    prompt, count = [2, 1, 4], 6_000
    decoding = decoder(target, confidence_threshold=threshold)
    written = decoding.generate([prompt] * count, 3, temperature=0.8, mode=mode)
    logits = next_logits(random_target(**SMALL), prompt, 3)
    expected = joint([probabilities(each, temperature=0.8) for each in logits])
    assert p_value(written, expected) > 0.001
    assert sum(sum(row) for row in decoding.accepted) > 0.2 * count


def test_a_wrong_distribution_is_seen(target, monkeypatch):
    """What the test above would say of drafts whose probabilities are others."""
    prompt, count = [2, 1, 4], 6_000
    decoding = decoder(target)
    pick = decoding._pick

    def wrong(*args):
        drafts = pick(*args)
        return drafts._replace(probabilities=drafts.probabilities.flip(-1))

    monkeypatch.setattr(decoding, "_pick", wrong)
    written = decoding.generate([prompt] * count, 3, temperature=0.8)
    logits = next_logits(random_target(**SMALL), prompt, 3)
    expected = joint([probabilities(each, temperature=0.8) for each in logits])
    assert p_value(written, expected) < 0.001


def test_the_switch_tries_both_and_keeps_the_faster_one():
    switch = ModeSwitch()
    seconds = {("parallel", 1): 2.0, ("sequential", 1): 3.0}
    seconds |= {("parallel", 8): 9.0, ("sequential", 8): 4.0}
    chosen = {1: [], 8: []}
    for _ in range(3 * TRIALS):
        for size, modes in chosen.items():
            mode = switch.choose(size)
            modes.append(mode)
            switch.seconds[size, mode].append(seconds[mode, size])
    assert chosen[1].count("sequential") == TRIALS
    assert chosen[8].count("parallel") == TRIALS
    assert chosen[1][-1] == "parallel" and chosen[8][-1] == "sequential"


def test_acceptance_is_that_of_decoding(tmp_path):
    """The draft loop that measures every drafter, around the same mask tokens."""
    target = random_target(**SMALL)
    drafter = random_drafter(target)
    settings = {"target": "", "fingerprint": fingerprint(target), "draft_tokens": 4}
    save_flexdraft(drafter, tmp_path, settings, dtype=torch.float32)
    texts = {"input_ids": [(models.random_tokens(90) % 5).tolist()]}
    held_out = FlexDraftAcceptance(
        target,
        {50: passages(texts, 50, 2, seed=0)},
        budgets=[16, 64],
        temperatures=[0.0, 1.0],
        new_tokens=40,
        settings={
            "num_speculative_tokens": NUM_DRAFTS,
            "sink_tokens": 3,
            "local_tokens": 4,
        },
        page_size=4,
    )
    found = {(r.budget, r.temperature): r for r in held_out.rows(tmp_path)}
    for budget in (16, 64):
        decoding = decoder(target, selector=SELECTOR, kv_budget=budget)
        accepted = []
        for prompt, written in zip(
            held_out._prompts[50], held_out._written[50], strict=True
        ):
            cache = decoding.new_cache(1, 120)
            context = [*prompt, written[0]]
            decoding.read(cache, torch.tensor(context[:-2]))
            decoding.extend(cache, torch.tensor(context[-2:-1]))
            end = len(context) + 40
            while len(context) < end:
                drafts = decoding.draft(
                    cache, torch.tensor(context[-1:]), 0.0, torch.Generator()
                )
                start = len(context) - len(prompt)
                right = written[start : start + NUM_DRAFTS]
                pairs = zip(drafts.tokens[0].tolist(), right, strict=True)
                count = 0
                for draft, token in pairs:
                    if draft != token:
                        break
                    count += 1
                accepted.append(count)
                more = written[start : start + count + 1]
                decoding.extend(cache, torch.tensor([context[-1], *more[:-1]]))
                context += more
        expected = 1 + sum(accepted) / len(accepted)
        assert found[budget, 0.0].acceptance_length == pytest.approx(expected)
        assert found[budget, 1.0].acceptance_length > 1


def test_masks_that_know_the_bonus_token_come_after_verification(target):
    drafter = random_drafter(target, sees_bonus=True, drafts_blind=False)
    decoding = FlexDecoder(target, drafter, num_drafts=NUM_DRAFTS)
    with pytest.raises(ConfigurationError, match="has yet to find; use 'sequential'"):
        decoding.generate(prompts(1), 3, mode="parallel")


def test_a_policy_that_needs_attention_is_refused_before_measuring(target):
    settings = {"num_speculative_tokens": 4, "eviction_policy": "observation_window"}
    with pytest.raises(ConfigurationError, match="by keys alone"):
        FlexDraftAcceptance(
            target,
            {50: [[1] * 50]},
            budgets=[16],
            temperatures=[0.0],
            new_tokens=4,
            settings=settings,
            page_size=4,
        )
