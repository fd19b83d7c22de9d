"""vLLM with a drafter that drafts some tokens alone: what it writes is its target's.

Of 8 tokens four are drafted, so that outputs are full of tokens that are not.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.integration.test_sampling import (  # noqa: F401, a fixture
    check,
    target,
)
from tests.support import models
from tests.support.distributions import (
    SamplingEngine,
    next_logits,
    sampling_engine,
)
from tests.support.engines import Job
from tests.support.processes import nothing
from tests.support.runner_v2 import schedule_ahead
from tests.support.tiny_pair import (
    NUM_DRAFTS,
    NUM_SAMPLES,
    NUM_TOKENS,
    PROMPT,
    SIZES,
    distribution,
    engine_args,
    expected_acceptance,
    job,
)
from vllm_budgetdraft.drafter.draft_vocabulary import write_draft_vocabulary
from vllm_budgetdraft.evaluation.acceptance import greedy_continuation

pytestmark = pytest.mark.vllm

IDS = torch.tensor([6, 0, 3, 4])
RUNNERS = {"v1": nothing, "v2": schedule_ahead}


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafter")
    models.write_model(folder, models.llama(**SIZES), seed=9)
    write_draft_vocabulary(folder, IDS)
    return folder


@pytest.fixture(scope="module", params=RUNNERS)
def engine(
    request: pytest.FixtureRequest,
    target: Path,  # noqa: F811
    drafter: Path,
) -> Iterator[SamplingEngine]:
    prepare = RUNNERS[request.param]
    with sampling_engine(engine_args(target, drafter), prepare) as engine:
        yield engine


def test_greedy_outputs_are_the_targets(engine, target):  # noqa: F811
    model = models.read_model(target)
    prompts = [[*PROMPT, token, *PROMPT] for token in range(7)]
    expected = [greedy_continuation(model, prompt, 24) for prompt in prompts]
    found = engine.sample(Job(prompts, {"temperature": 0.0, "max_tokens": 24}))
    assert found.token_ids == expected
    assert sum(found.accepted) > 0
    written = {token for tokens in expected for token in tokens}
    assert not written <= set(IDS.tolist()), "some of what it writes is never drafted"


@pytest.mark.parametrize(
    ("prepare", "num_samples"),
    [
        (nothing, NUM_SAMPLES),
        # In the interpreter sampling takes long.
        pytest.param(schedule_ahead, 1_000, marks=pytest.mark.slow),
    ],
    ids=RUNNERS,
)
def test_samples_have_the_targets_distribution(
    prepare: Callable[[], None],
    num_samples: int,
    target: Path,  # noqa: F811
    drafter: Path,
) -> None:
    """And as many drafts are accepted as the distributions on the four allow."""
    logits = next_logits(models.read_model(target), PROMPT, NUM_TOKENS)
    drafted = next_logits(models.read_model(drafter), PROMPT, NUM_TOKENS)
    expected = expected_acceptance(logits, [_of_four(each) for each in drafted])
    with sampling_engine(engine_args(target, drafter), prepare) as engine:
        sampled = engine.sample(job(num_samples, temperature=1.0))
        seeded = job(20, temperature=1.0, seed=5)
        first, second = (engine.sample(seeded).token_ids for _ in range(2))
    check(sampled, distribution(logits))
    deviation = (expected * (1 - expected) / sampled.num_drafts) ** 0.5
    assert abs(sampled.accepted[0] / sampled.num_drafts - expected) < 4 * deviation
    assert first == second == first[:1] * 20


def _of_four(logits: Tensor) -> Tensor:
    masked = torch.full_like(logits, -torch.inf)
    masked[..., IDS] = logits[..., IDS]
    return masked


@pytest.mark.parametrize(
    "sampling",
    [
        {"regex": "[bcf]{12}"},
        {"allowed_token_ids": [1, 2, 5]},
        {"logit_bias": {1: 100.0, 2: 100.0}},
        {"bad_words": ["g", "a"]},
        {"presence_penalty": 2.0, "repetition_penalty": 1.5},
    ],
    ids=["grammar", "allowed", "bias", "bad_words", "penalties"],
)
def test_what_a_request_demands_may_be_what_is_never_drafted(engine, sampling):
    """It is written without drafts of it, and nothing fails."""
    requests = [PROMPT, [*PROMPT, 4, 4]]
    greedy = {"temperature": 0.0, "max_tokens": 12, **sampling}
    undrafted = greedy | {"extra_args": {"num_speculative_tokens": 0}}
    expected = engine.sample(Job(requests, undrafted))
    found = engine.sample(Job(requests, greedy))
    assert found.token_ids == expected.token_ids
    assert expected.num_draft_tokens < 12 * NUM_DRAFTS
    if "regex" in sampling or "allowed_token_ids" in sampling:
        written = {token for tokens in found.token_ids for token in tokens}
        assert written.isdisjoint(IDS.tolist())
        assert sum(found.accepted) == 0
