"""Model runner V2 above temperature 0: tokens have the target's distribution.

Its sampling kernels take long in Triton's interpreter, whose blocks are those of large
vocabularies. ``test_speculator`` holds what they are given to what drafts are drawn
from.
"""

from collections.abc import Iterator

import pytest

from tests.integration import test_sampling as v1
from tests.integration.test_sampling import (  # noqa: F401, fixtures
    drafter,
    drafter_logits,
    target,
    target_logits,
)
from tests.support.distributions import Sampled, SamplingEngine, sampling_engine
from tests.support.runner_v2 import schedule_ahead
from tests.support.tiny_pair import engine_args, expected_acceptance, job

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_SAMPLES = 2_000


@pytest.fixture(scope="module")
def engine(target, drafter) -> Iterator[SamplingEngine]:  # noqa: F811
    """Whose drafter's logits are rounded, and told so."""
    args = engine_args(target, drafter, draft_dtype="bfloat16")
    with sampling_engine(args, schedule_ahead) as engine:
        yield engine


@pytest.fixture(scope="module")
def sampled(engine: SamplingEngine) -> Sampled:
    return engine.sample(job(NUM_SAMPLES, temperature=1.0))


test_samples = v1.test_samples_have_the_targets_distribution


def test_drafts_are_accepted_where_distributions_agree(
    sampled,
    target_logits,  # noqa: F811
    drafter_logits,  # noqa: F811
):
    expected = expected_acceptance(target_logits, drafter_logits)
    deviation = (expected * (1 - expected) / sampled.num_drafts) ** 0.5
    found = sampled.accepted[0] / sampled.num_drafts
    assert abs(found - expected) < 4 * deviation
