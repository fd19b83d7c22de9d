"""Above temperature 0: drafted or not, tokens have the target's distribution.

Two tiny random models with 8 tokens, so that of every output the exact probability is
known, from ``transformers`` in float64. What vLLM emits is held against it by Pearson's
chi-square test, and must fail that test wherever drafts come with wrong probabilities.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tests.support import models
from tests.support.distributions import (
    Sampled,
    SamplingEngine,
    next_logits,
    p_value,
    probabilities,
    sampling_engine,
    write_tokenizer,
)
from tests.support.engines import Job
from tests.support.tiny_pair import (
    FEW_SAMPLES,
    LETTERS,
    LONG_PROMPT,
    NUM_DRAFTS,
    NUM_SAMPLES,
    NUM_TOKENS,
    PROMPT,
    SIZES,
    acceptance,
    distribution,
    engine_args,
    expected_acceptance,
    job,
    likeliest,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    models.write_model(folder, models.llama(**SIZES), seed=2)
    write_tokenizer(folder, LETTERS)
    return folder


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, which agrees with the target on half of the probability."""
    folder = tmp_path_factory.mktemp("drafter")
    return models.write_model(folder, models.llama(**SIZES), seed=9)


@pytest.fixture(scope="module")
def target_logits(target: Path) -> list[Tensor]:
    return next_logits(models.read_model(target), PROMPT, NUM_TOKENS)


@pytest.fixture(scope="module")
def drafter_logits(drafter: Path) -> list[Tensor]:
    return next_logits(models.read_model(drafter), PROMPT, NUM_TOKENS)


@pytest.fixture(scope="module")
def engine(target: Path, drafter: Path) -> Iterator[SamplingEngine]:
    with sampling_engine(engine_args(target, drafter)) as engine:
        yield engine


def check(sampled: Sampled, expected: Tensor) -> None:
    assert p_value(sampled.token_ids, expected) > 0.001
    assert sampled.accepted[1] > 0.01 * len(sampled.token_ids)


@pytest.fixture(scope="module")
def sampled(engine: SamplingEngine) -> Sampled:
    return engine.sample(job(temperature=1.0))


def test_samples_have_the_targets_distribution(sampled, target_logits):
    check(sampled, distribution(target_logits))


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in [
            *((0.7, 0.9), (0.5, 1.0), (1.5, 1.0)),
            *((0.5, 0.8), (1.0, 0.8), (1.5, 0.8)),
        ]
    ],
)
def test_at_other_temperatures(temperature, top_p, engine, target_logits):
    sampled = engine.sample(job(temperature=temperature, top_p=top_p))
    check(sampled, distribution(target_logits, temperature=temperature, top_p=top_p))


@pytest.mark.slow
def test_after_whole_drafts(engine, target):
    num_tokens = NUM_DRAFTS + 2
    logits = next_logits(models.read_model(target), PROMPT, num_tokens)
    sampled = engine.sample(job(temperature=1.0, max_tokens=num_tokens))
    last = [tokens[-3:] for tokens in sampled.token_ids]
    assert p_value(last, distribution(logits).sum((0, 1))) > 0.001
    assert sampled.accepted[-1] > 0.1 * NUM_SAMPLES


def test_a_batch_of_many_kinds(engine, target, target_logits):
    """Every third request is greedy."""
    bias = {0: 1.5, 3: -2.0}
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "cool": {"temperature": 0.5},
        "top_p": {"temperature": 1.5, "top_p": 0.8},
        "min_p": {"temperature": 1.2, "top_p": 0.9, "min_p": 0.15},
        "biased": {"temperature": 1.0},
    }
    order = ["greedy", "cool", "top_p", "greedy", "min_p", "biased"]
    torch.manual_seed(0)
    prompts = torch.randint(SIZES["vocab_size"], (20, 4)).tolist()
    greedy_prompts = cycle(prompts)
    requests = [
        (
            next(greedy_prompts) if name == "greedy" else PROMPT,
            {
                "max_tokens": NUM_TOKENS,
                "logit_bias": bias if name == "biased" else None,
                **kinds[name],
            },
        )
        for name in 1500 * order
    ]
    outputs = engine.sample(
        Job([prompt for prompt, _ in requests], [each for _, each in requests])
    ).token_ids
    model = models.read_model(target)
    expected = [likeliest(next_logits(model, each, NUM_TOKENS)) for each in prompts]
    assert outputs[::3] == 150 * expected
    biases = torch.tensor([bias.get(i, 0.0) for i in range(SIZES["vocab_size"])])
    for name in kinds.keys() - {"greedy"}:
        added = biases if name == "biased" else torch.zeros_like(biases)
        logits = [each + added for each in target_logits]
        of_kind = outputs[order.index(name) :: len(order)]
        assert p_value(of_kind, distribution(logits, **kinds[name])) > 0.001, name


@pytest.mark.slow
def test_prompts_of_one_token(engine, target):
    """If others are decoding, vLLM gives such a prompt placeholders for drafts."""
    prompt = PROMPT[-1:]
    logits = next_logits(models.read_model(target), prompt, NUM_TOKENS)
    sampling = job(temperature=1.0).sampling
    sampled = engine.sample(Job([prompt] * NUM_SAMPLES, sampling))
    first = [tokens[:1] for tokens in sampled.token_ids]
    assert p_value(first, probabilities(logits[0])) > 0.001
    check(sampled, distribution(logits))


def test_a_grammar(engine, target_logits):
    """Of drafts that it forbids the rest is verified."""
    starts = torch.tensor([True] * len(LETTERS) + [False])
    follows = starts.repeat(SIZES["vocab_size"], 1)
    follows[:4, :2] = False
    follows[4:7, 2:] = False
    allowed = [starts, follows, starts]
    logits = [
        each.masked_fill(~mask, -torch.inf)
        for each, mask in zip(target_logits, allowed, strict=True)
    ]
    sampled = engine.sample(
        job(FEW_SAMPLES, temperature=1.0, regex="([a-d][c-g]|[e-g][ab]){3}")
    )
    check(sampled, distribution(logits))
    assert sampled.num_draft_tokens < 0.9 * NUM_DRAFTS * sampled.num_drafts


@contextmanager
def with_probabilities(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    from vllm_budgetdraft.vllm_integration.v1.proposer import BudgetDraftProposer

    original = BudgetDraftProposer.take_probabilities

    def changed(self: Any) -> Any:
        taken = original(self)
        return taken and (taken[0], change(taken[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BudgetDraftProposer, "take_probabilities", changed)
        yield


def permuted(x: Tensor) -> Tensor:
    return x.roll(1, -1)


def as_at_half_the_temperature(x: Tensor) -> Tensor:
    return x.square() / x.square().sum(-1, keepdim=True)


@contextmanager
def unpatched_expansion() -> Iterator[None]:
    from vllm.v1.sample import rejection_sampler

    name = "expand_batch_to_tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rejection_sampler, name, getattr(rejection_sampler, name).__wrapped__
        )
        yield


@pytest.mark.parametrize(
    "wrong",
    [
        partial(with_probabilities, permuted),
        partial(with_probabilities, as_at_half_the_temperature),
        unpatched_expansion,
    ],
    ids=["permuted", "of_another_temperature", "unpatched"],
)
def test_what_is_wrong_is_seen(wrong, engine, target_logits):
    sampled = engine.sample(job(FEW_SAMPLES, temperature=0.5), wrong)
    assert (
        p_value(sampled.token_ids, distribution(target_logits, temperature=0.5)) < 1e-6
    )


@pytest.fixture(scope="module")
def sampled_of_greedy_drafts(target: Path, drafter: Path) -> Sampled:
    args = engine_args(target, drafter, draft_sample_method="greedy")
    with sampling_engine(args) as engine:
        return engine.sample(job(temperature=1.0))


@pytest.mark.slow
def test_greedy_drafts(sampled_of_greedy_drafts, target_logits):
    check(sampled_of_greedy_drafts, distribution(target_logits))


def test_drawn_drafts_are_accepted_where_distributions_agree(
    sampled, target_logits, drafter_logits
):
    expected = expected_acceptance(target_logits, drafter_logits)
    assert sampled.accepted[0] / sampled.num_drafts == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_greedy_drafts_are_accepted_where_the_target_has_them(
    sampled, sampled_of_greedy_drafts, target_logits, drafter_logits
):
    target = [probabilities(each) for each in target_logits]
    drafts = [one_hot(each.argmax(-1), each.shape[-1]) for each in drafter_logits]
    agreed = [p * draft for p, draft in zip(target, drafts, strict=True)]
    expected = acceptance(target, agreed)
    greedy, drawn = (
        each.accepted[0] / each.num_drafts
        for each in (sampled_of_greedy_drafts, sampled)
    )
    assert greedy == pytest.approx(expected, rel=0.02)
    assert greedy < drawn


@pytest.fixture(scope="module")
def cautious(target: Path, drafter: Path) -> Iterator[SamplingEngine]:
    """Drafts of many lengths, from a cache that has dropped a third of the prompt."""
    args = engine_args(target, drafter, draft_confidence_threshold=0.4)
    with sampling_engine(args) as engine:
        yield engine


@pytest.fixture(scope="module")
def logits_after_long_prompt(target: Path) -> list[Tensor]:
    return next_logits(models.read_model(target), LONG_PROMPT, NUM_TOKENS)


@pytest.mark.slow
def test_drafts_that_end_by_confidence(cautious, logits_after_long_prompt):
    sampling = job(temperature=1.0).sampling
    sampled = cautious.sample(Job([LONG_PROMPT] * NUM_SAMPLES, sampling))
    check(sampled, distribution(logits_after_long_prompt))
    length = sampled.num_draft_tokens / sampled.num_drafts
    assert 1.2 < length < NUM_DRAFTS - 0.2


@contextmanager
def confidence_in_what_was_drawn() -> Iterator[None]:
    from vllm_budgetdraft.proposer.draft_proposer import DraftProposer

    original = DraftProposer.draft

    def draft(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = original(self, *args, **kwargs)
        drawn = drafts.probabilities.gather(2, drafts.tokens[..., None])
        return drafts._replace(confidences=drawn[..., 0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftProposer, "draft", draft)
        yield


@pytest.mark.slow
def test_confidence_that_depends_on_the_draw_is_seen(
    cautious, logits_after_long_prompt
):
    sampling = job(temperature=1.0).sampling
    wrong = Job([LONG_PROMPT] * FEW_SAMPLES, sampling)
    sampled = cautious.sample(wrong, confidence_in_what_was_drawn)
    expected = distribution(logits_after_long_prompt)
    assert p_value(sampled.token_ids, expected) < 1e-6


@pytest.mark.slow
def test_lengths_by_batch_size(target, drafter, target_logits):
    """Steps have too few tokens for all, the fewer requests the longer drafts are."""
    schedule = [[1, 140, 1], [141, 200, 3]]
    args = engine_args(target, drafter, num_speculative_tokens_per_batch_size=schedule)
    args |= {"max_num_seqs": 200, "max_num_batched_tokens": 400}
    with sampling_engine(args) as engine:
        sampled = engine.sample(job(temperature=1.0))
    check(sampled, distribution(target_logits))
    assert 1.2 < sampled.num_draft_tokens / sampled.num_drafts < NUM_DRAFTS - 0.2
