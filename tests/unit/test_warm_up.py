"""What runs for requests has been compiled for them: kernels, interpreted.

The drafter has heads of 16 numbers, for all drafters have a multiple of that. With
others, the strides of a prompt may be a multiple of 16 or not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.drafting import Requests, build_proposer, positions_of
from tests.support.fake_gpu import Launches, every_argument_is_checked
from tests.support.fake_graph import FakeGraph
from tests.support.launch_count import idle_kernels
from tests.support.models import llama, random_tokens, write_model
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.warm_up import warm_up

NUM_SLOTS, NUM_DRAFTS = 2, 2
SETTINGS = {
    "default": {},
    "a_chunk_below_the_budget": {"draft_prefill": "streaming"},
    "last_queries": {"chunk_score": "last_queries"},
    "observation_window_relative": {
        "eviction_policy": "observation_window",
        "position_mode": "cache_relative",
    },
    "heavy_hitter": {"eviction_policy": "heavy_hitter"},
    "long_passes": {"draft_prefill_chunk": 100, "kv_budget": 100},
    "keep_all_greedy": {
        "eviction_policy": "keep_all",
        "draft_sample_method": "greedy",
    },
}


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama(
        head_dim=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )
    return write_model(tmp_path_factory.mktemp("drafter"), config)


def build(drafter: Path, **settings: Any) -> DraftProposer:
    sizes = {
        "num_slots": NUM_SLOTS,
        "max_model_len": 160,
        "num_speculative_tokens": NUM_DRAFTS,
        "attention_backend": "triton",
        "kv_budget": 40,
        "page_size": 8,
        "recent_window": 24,
        "sink_tokens": 8,
        "local_tokens": 8,
        "draft_prefill_chunk": 30,
    }
    return build_proposer(drafter, **sizes | settings)


@contextmanager
def looked_at(operations: ModuleType) -> Iterator[Launches]:
    """Records launches and checks their arguments; kernels compute nothing."""
    with every_argument_is_checked(operations), idle_kernels():
        with Launches().record() as launches:
            yield launches


def serve(proposer: DraftProposer) -> None:
    """Prompts of all lengths, tokens without drafts, and drafts of every kind."""
    requests = Requests(proposer)
    for slot, num_tokens in enumerate((33, 71)):
        requests.start(slot, num_tokens, seed=slot)
    draws = proposer.config.draft_sample_method == "probabilistic"
    for batch in ([0], [1, 0]):
        for width in range(1, proposer.max_append + 1):
            starts = {}
            for slot in batch:
                context = requests.contexts[slot]
                starts[slot] = len(context) - FIRST_WIDTH
                context += [7] * width
            requests.append(starts, width)
        for num_drafts in range(1, NUM_DRAFTS + 1):
            for temperatures in [None, [0.0] * len(batch)] if draws else [None]:
                requests.drafts(batch, num_drafts, temperatures)
            if draws:
                ones, top_k = [1.0] * len(batch), [2] * len(batch)
                requests.drafts(batch, num_drafts, ones, top_k)
    for num_tokens in (2, 12, 24, 52):
        requests.release(1)
        requests.start(1, num_tokens, seed=9)


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        *(pytest.param(SETTINGS[name], False, id=name) for name in SETTINGS),
        pytest.param(SETTINGS["default"], True, id="graphs"),
    ],
)
def test_warm_up_reaches_every_kernel_that_requests_need(
    drafter, settings, graphs, monkeypatch
):
    """And no kernel is given what it would misread."""
    fused = pytest.importorskip("budgetdraft_kernels.fused", reason="needs Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    proposer = build(drafter, **settings)
    with looked_at(fused) as launches:
        warm_up(proposer)
        if graphs:
            proposer.capture_graphs(FakeGraph)
        known = set(launches.keys)
        assert known
        serve(proposer)
    assert not launches.since(known, "budgetdraft_kernels")


@pytest.mark.parametrize("score", ["last_key", "last_queries"])
def test_prompts_of_a_length_are_scored_by_the_kernel_of_one(
    drafter, score, monkeypatch
):
    """The policy is asked for all of them at once."""
    fused = pytest.importorskip("budgetdraft_kernels.fused", reason="needs Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    proposer = build(drafter, draft_prefill_chunk=100, chunk_score=score)
    contexts = [random_tokens(45, seed) for seed in range(NUM_SLOTS)]
    with looked_at(fused) as launches:
        for slots in ([0], [0, 1]):
            known = set(launches.keys)
            for slot in slots:
                proposer.start_reading(slot, 45)
            assert proposer.read(slots, positions_of(*contexts), 100) == {}
            proposer.release_all()
    assert known
    assert not launches.since(known, "budgetdraft_kernels")
