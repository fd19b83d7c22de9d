"""In vLLM's model runner V2, as in V1: the tokens are plain vLLM's, and drafts go on.

On a CPU that runner's kernels run in Triton's interpreter. Scheduling is asynchronous:
the engine schedules a step before it knows what the last one accepted.
"""

from collections.abc import Iterator

import pytest

from tests.integration.test_lifecycle import (
    COMMON,
    FEW_BLOCKS,
    MAX_MODEL_LEN,
    draft,
    test_aborts_in_prefill_and_in_decode_leave_nothing_behind,
    test_an_id_used_again_at_once_is_another_request,
    test_cached_prefixes_are_read_by_the_drafter_all_the_same,
    test_chunks_of_a_prompt_and_drafts_share_steps,
    test_max_tokens_inside_an_accepted_draft_is_the_end,
    test_random_lives,
    test_structured_outputs_are_plain_vllms,
)
from tests.support.engines import (
    DRAFTER,
    TARGET,
    EngineProcess,
    engine_process,
)
from tests.support.runner_v2 import schedule_ahead

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def plain() -> Iterator[EngineProcess]:
    with engine_process(COMMON) as engine:
        yield engine


@pytest.fixture(scope="module")
def self_drafting() -> Iterator[EngineProcess]:
    """Which reads a prompt at once: until then, drafts would be refused."""
    settings = draft(
        model=TARGET, kv_budget=MAX_MODEL_LEN, draft_prefill_chunk=MAX_MODEL_LEN
    )
    with engine_process(COMMON | FEW_BLOCKS | settings, schedule_ahead) as engine:
        yield engine


@pytest.fixture(scope="module")
def budgeted() -> Iterator[EngineProcess]:
    settings = draft(
        model=DRAFTER,
        eviction_policy="heavy_hitter",
        draft_prefill="streaming",
        draft_prefill_chunk=150,
        kv_budget=96,
        recent_window=48,
    )
    with engine_process(COMMON | FEW_BLOCKS | settings, schedule_ahead) as engine:
        yield engine
