"""Above temperature 0: drafted or not, tokens have the target's distribution.

Two tiny random models with 8 tokens, so that of every output the exact probability is
known, from ``transformers`` in float64. What vLLM emits is held against it by Pearson's
chi-square test, and must fail that test wherever drafts come with wrong probabilities.
Requests with seeds get the very tokens that they get without speculation.
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
    joint,
    next_logits,
    p_value,
    probabilities,
    sampling_engine,
    write_tokenizer,
)
from tests.support.engines import DRAFTER, Answer, Job, book_tokens, run_jobs

pytestmark = pytest.mark.vllm

NUM_SAMPLES = 20_000
#: Enough to tell apart what is not close.
FEW_SAMPLES = 2_000
NUM_DRAFTS = 3
#: The first token comes from the prompt; those after it are drafted.
NUM_TOKENS = 3
LETTERS = "abcdefg"
PROMPT = [2, 1, 5]
LONG_PROMPT = PROMPT * 8

SIZES = {
    "vocab_size": len(LETTERS) + 1,
    "eos_token_id": len(LETTERS),
    "bos_token_id": None,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


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


def engine_args(target: Path, drafter: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model": str(target),
        "max_model_len": 64,
        "max_num_seqs": 1000,
        "enable_prefix_caching": False,
        "speculative_config": {
            "method": "budgetdraft",
            "model": str(drafter),
            "num_speculative_tokens": NUM_DRAFTS,
            "kv_budget": 16,
            "recent_window": 16,
            "page_size": 4,
            **settings,
        },
    }


@pytest.fixture(scope="module")
def engine(target: Path, drafter: Path) -> Iterator[SamplingEngine]:
    with sampling_engine(engine_args(target, drafter)) as engine:
        yield engine


def job(num: int = NUM_SAMPLES, **sampling: Any) -> Job:
    return Job([PROMPT] * num, {"max_tokens": NUM_TOKENS, **sampling})


def distribution(logits: list[Tensor], **settings: float) -> Tensor:
    return joint([probabilities(each, **settings) for each in logits])


def check(sampled: Sampled, expected: Tensor) -> None:
    assert p_value(sampled.token_ids, expected) > 0.001
    assert sampled.accepted[1] > 0.01 * len(sampled.token_ids)


@pytest.fixture(scope="module")
def sampled(engine: SamplingEngine) -> Sampled:
    return engine.sample(job(temperature=1.0))


def test_samples_have_the_targets_distribution(sampled, target_logits):
    check(sampled, distribution(target_logits))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(0.5, 1.0), (1.5, 1.0), (0.5, 0.8), (1.0, 0.8), (1.5, 0.8)],
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


def likeliest(logits: list[Tensor]) -> list[int]:
    tokens: list[int] = []
    for each in logits:
        tokens.append(int(each[tuple(tokens)].argmax()))
    return tokens


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
    from vllm_budgetdraft.vllm_integration.runner_v1 import BudgetDraftProposer

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


def acceptance(target: list[Tensor], agreed: list[Tensor]) -> float:
    """Share of first draft tokens that are accepted, where outputs have three tokens.

    Drafts begin after the first one and, if that draft fails, after the second.

    Args:
        target: probabilities of the next token.
        agreed: what of them is accepted.
    """
    second = target[0][:, None] * (target[1] - agreed[1])
    accepted = joint([target[0], agreed[1]]).sum() + joint([second, agreed[2]]).sum()
    return float(accepted / (1 + second.sum()))


def expected_acceptance(target: list[Tensor], drafter: list[Tensor]) -> float:
    """``acceptance`` of drafts that are drawn, by the logits of both."""
    pairs = zip(target, drafter, strict=True)
    pairs = [(probabilities(p), probabilities(q)) for p, q in pairs]
    return acceptance([p for p, _ in pairs], [torch.minimum(*each) for each in pairs])


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


SEEDED = {
    "temperature": {"temperature": 0.7},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 3},
    "penalties": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
    },
    "min_p": {"min_p": 0.1},
    "logit_bias": {"logit_bias": {14: 3.0, 300: -100.0}},
    "no drafts": {"top_k": 3, "extra_args": {"num_speculative_tokens": 0}},
    "short": {"top_k": 30},
    "short, min_p": {"temperature": 2.0, "min_p": 0.2},
}
GREEDY = {
    "greedy": {},
    "greedy, min_p": {"min_p": 0.1},
    "greedy, logit_bias": {"logit_bias": {14: 3.0, 300: -100.0}},
    "greedy, short, logit_bias": {"logit_bias": {300: 100.0}},
}
UNSEEDED = [{"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}]


@pytest.fixture(scope="module")
def repeatable() -> dict[str, Job]:
    """Requests that have but one right output, each alone."""
    common = {"max_tokens": 24, "ignore_eos": True}
    sampling = {
        name: {**common, "temperature": 1.0, "seed": i, **settings}
        for i, (name, settings) in enumerate(SEEDED.items())
    } | {
        name: {**common, "temperature": 0.0, **settings}
        for name, settings in GREEDY.items()
    }
    return {
        name: Job([book_tokens(1 if "short" in name else 60, start=70 * i)], settings)
        for i, (name, settings) in enumerate(sampling.items())
    }


@pytest.fixture(scope="module")
def plain(repeatable: dict[str, Job]) -> dict[str, Answer]:
    return run_jobs({"max_model_len": 512}, repeatable)


@pytest.mark.parametrize("threshold", [pytest.param(0.0, marks=pytest.mark.slow), 0.4])
def test_seeds_give_what_they_give_without_speculation(threshold, repeatable, plain):
    settings = {
        "method": "budgetdraft",
        "model": DRAFTER,
        "num_speculative_tokens": 5,
        "kv_budget": 64,
        "recent_window": 64,
        "draft_confidence_threshold": threshold,
    }
    others = [{"max_tokens": 60, "ignore_eos": True, **each} for each in UNSEEDED]
    batch = Job(
        [book_tokens(30)] * len(others)
        + [job.prompts[0] for job in repeatable.values()],
        others + [job.sampling for job in repeatable.values()],
    )
    args = {
        "max_model_len": 512,
        # The batch begins with some, and others come in, their prompts in parts.
        "max_num_seqs": 8,
        "max_num_batched_tokens": 96,
        "speculative_config": settings,
    }
    answers = run_jobs(args, {**repeatable, "batch": batch})
    in_batch = answers["batch"].token_ids[len(others) :]
    for name, tokens in zip(repeatable, in_batch, strict=True):
        assert answers[name].token_ids == plain[name].token_ids, name
        assert [tokens] == plain[name].token_ids, f"{name}, in the batch"
        assert bool(answers[name].num_draft_tokens) == (name != "no drafts"), name
    assert answers["batch"].num_accepted_tokens > 50
