"""In vLLM, by default: lengths go by what steps cost, which is timed at start-up."""

import time

import pytest

from tests.support.engines import DRAFTER, Job, book_tokens, run_jobs
from tests.support.processes import nothing

pytestmark = pytest.mark.vllm

NUM_DRAFTS, NEW_TOKENS = 5, 64
COMMON = {"max_model_len": 512, "max_num_seqs": 4}
DEFAULT = {
    "method": "budgetdraft",
    "model": DRAFTER,
    "num_speculative_tokens": NUM_DRAFTS,
    "kv_budget": 64,
}


@pytest.fixture(scope="module")
def jobs() -> dict[str, Job]:
    prompts = [book_tokens(100 + 50 * i, start=700 * i) for i in range(4)]
    greedy = {"max_tokens": NEW_TOKENS, "ignore_eos": True}
    return {"alone": Job(prompts[:1], greedy), "four": Job(prompts, greedy)}


@pytest.fixture(scope="module")
def plain(jobs):
    return run_jobs(COMMON, jobs)


def drafts_take_long() -> None:
    from vllm_budgetdraft.proposer.draft_proposer import DraftProposer

    draft = DraftProposer.draft

    def draft_slowly(*args, **kwargs):
        time.sleep(0.3)
        return draft(*args, **kwargs)

    DraftProposer.draft = draft_slowly


def timing_fails() -> None:
    from vllm_budgetdraft.vllm_integration import step_timing

    def fail(*_) -> float:
        raise RuntimeError("no time")

    step_timing._draft_seconds = fail


@pytest.mark.parametrize(
    ("prepare", "least", "most"),
    [
        pytest.param(nothing, 0, NUM_DRAFTS, id="as_timed"),
        # Trials alone, of which a busy machine pays for some more.
        pytest.param(drafts_take_long, 0, 0.3, id="drafts_never_pay"),
        # As many as a fixed length drafts.
        pytest.param(timing_fails, 0.7, NUM_DRAFTS, id="timing_fails"),
    ],
)
def test_output_is_plain_vllms_and_drafts_are_those_that_pay(
    prepare, least, most, jobs, plain
):
    drafted = run_jobs(COMMON | {"speculative_config": DEFAULT}, jobs, prepare)
    for name, answer in drafted.items():
        assert answer.token_ids == plain[name].token_ids, name
        generated = sum(map(len, answer.token_ids))
        assert least <= answer.num_draft_tokens / generated <= most, name
