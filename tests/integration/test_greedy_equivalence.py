"""In vLLM, greedy: whatever is drafted, the tokens are plain vLLM's.

Covers: 8 prompts of 3 to 4,000 tokens in one batch, prompts longer than a prefill
chunk, outputs longer than the recent window (so that pages are recycled), stop strings,
ignore_eos, requests that end at max_model_len beside others that go on, every policy,
and prompts of 8 times what the drafter was made for.
"""

import pytest

from tests.support.engines import (
    DRAFTER,
    FLEXDRAFT,
    NATIVE_512,
    TARGET,
    Answer,
    Job,
    book_tokens,
    run_jobs,
)
from vllm_budgetdraft.vllm_integration.compatibility import is_at_least

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN = 4160
MIXED_LENGTHS = (3, 17, 64, 500, 1023, 2048, 3000, 4000)


@pytest.fixture(scope="module")
def jobs() -> dict[str, Job]:
    mixed = [book_tokens(n, start=40 * n % 900) for n in MIXED_LENGTHS]
    return {
        "mixed lengths": Job(mixed, {"max_tokens": 140, "ignore_eos": True}),
        "stop strings": Job(
            [book_tokens(300, start=700 * i) for i in range(4)],
            {"max_tokens": 120, "stop": [" the", ". "], "min_tokens": 20},
        ),
        "model length": Job(
            [book_tokens(MAX_MODEL_LEN - left) for left in (1, 2, 5, 40)]
            + [book_tokens(200)],
            {"max_tokens": 60, "ignore_eos": True},
        ),
    }


@pytest.fixture(scope="module")
def plain(jobs: dict[str, Job]) -> dict[str, Answer]:
    return run_jobs({"max_model_len": MAX_MODEL_LEN}, jobs)


def draft(**settings: object) -> dict[str, object]:
    return {
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "model": DRAFTER,
        "num_speculative_tokens": 5,
        "kv_budget": 256,
        "recent_window": 64,
        **settings,
    }


@pytest.mark.parametrize(
    "engine_args",
    [
        pytest.param({"speculative_config": draft()}, id="chunk_retrieval"),
        pytest.param(
            {
                "speculative_config": draft(
                    eviction_policy="sink_window", draft_prefill="streaming"
                ),
                "max_num_batched_tokens": 512,
            },
            id="sink_window-streaming",
        ),
        pytest.param(
            {"speculative_config": draft(model=NATIVE_512)}, id="beyond_native_range"
        ),
        pytest.param(
            {
                "speculative_config": draft(
                    model=NATIVE_512,
                    position_mode="cache_relative",
                    eviction_policy="heavy_hitter",
                )
            },
            id="heavy_hitter-cache_relative",
        ),
        pytest.param(
            {
                "speculative_config": draft(
                    eviction_policy="observation_window",
                    draft_prefill="streaming",
                    draft_prefill_chunk=100,
                ),
                "max_num_batched_tokens": 256,
            },
            id="observation_window-streaming",
        ),
        pytest.param(
            {
                "speculative_config": draft(
                    eviction_policy="keep_all", draft_prefill_chunk=100
                ),
                "enable_prefix_caching": False,
                "max_num_batched_tokens": 48,
            },
            id="keep_all",
        ),
        pytest.param(
            {
                "speculative_config": draft(model=FLEXDRAFT),
                "max_num_batched_tokens": 512,
            },
            id="flexdraft",
        ),
        pytest.param(
            {
                "speculative_config": draft(
                    model=FLEXDRAFT, eviction_policy="keep_all"
                ),
            },
            id="flexdraft-keep_all",
        ),
    ],
)
def test_output_is_plain_vllms_token_for_token(
    engine_args: dict, jobs: dict[str, Job], plain: dict[str, Answer]
) -> None:
    drafted = run_jobs({"max_model_len": MAX_MODEL_LEN, **engine_args}, jobs)
    import vllm

    # Older vLLM tells ids after a stop string, too, under any speculation.
    is_exact = is_at_least(vllm.__version__, (0, 32))
    for name, answer in drafted.items():
        if is_exact or name != "stop strings":
            assert answer.token_ids == plain[name].token_ids, name
        assert answer.texts == plain[name].texts, name
        assert answer.num_accepted_tokens > 0, name
    # A round drafts 5 tokens and yields at most 6: drafting never paused.
    generated = sum(map(len, drafted["mixed lengths"].token_ids))
    assert drafted["mixed lengths"].num_draft_tokens > 0.7 * generated


def test_a_target_that_drafts_for_itself_accepts_its_drafts() -> None:
    """Strongest test of positions, rollback and prefill: nothing may be refused."""
    job = Job(
        [book_tokens(n, start=n) for n in (2, 100, 777, 1500)],
        {"max_tokens": 96, "ignore_eos": True},
    )
    settings = draft(model=TARGET, kv_budget=2048, recent_window=256)
    answer = run_jobs(
        {"max_model_len": 2048, "speculative_config": settings}, {"job": job}
    )["job"]
    assert answer.num_draft_tokens > 300
    assert answer.num_accepted_tokens >= 0.99 * answer.num_draft_tokens


def test_long_prompts_keep_drafting_when_a_neighbour_reaches_the_model_length() -> None:
    """vLLM's own gate would end drafting for the whole batch (vLLM issue 58080)."""
    near_end = book_tokens(1000)
    job = Job(
        [near_end, book_tokens(50, start=500)],
        [
            {"max_tokens": 24, "ignore_eos": True},
            {"max_tokens": 96, "ignore_eos": True},
        ],
    )
    settings = draft(model=TARGET, kv_budget=1024, recent_window=256)
    answer = run_jobs(
        {"max_model_len": 1024, "speculative_config": settings}, {"job": job}
    )["job"]
    assert [len(tokens) for tokens in answer.token_ids] == [24, 96]
    assert answer.num_accepted_tokens >= 0.97 * answer.num_draft_tokens
