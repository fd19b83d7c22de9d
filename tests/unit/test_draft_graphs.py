"""Drafts that replay a graph are those of the loop that it was captured from."""

from random import Random

import pytest
import torch

from tests.support.drafting import Requests, build_proposer
from tests.support.fake_graph import FakeGraph, GraphError, forbid_allocation
from vllm_budgetdraft.proposer.draft_length import draft_lengths
from vllm_budgetdraft.proposer.draft_loop import DraftLoop
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer

SETTINGS = {
    "default": {},
    "heavy_hitter_relative": {
        "eviction_policy": "heavy_hitter",
        "position_mode": "cache_relative",
    },
    "drawn": {"draft_sample_method": "probabilistic"},
    "pages_of_one": {"eviction_policy": "sink_window", "page_size": 1},
}


def build(folder, **settings) -> DraftProposer:
    small = {"kv_budget": 40, "recent_window": 24, "page_size": 8}
    return build_proposer(
        folder,
        max_model_len=400,
        **{"num_slots": 5, "adaptive_draft_length": True, **small, **settings},
    )


def captured(folder, **settings) -> DraftProposer:
    proposer = build(folder, **settings)
    proposer.capture_graphs(FakeGraph)
    return proposer


def history(proposer: DraftProposer, num_steps: int) -> list[torch.Tensor]:
    """Of requests that come, draft together in any order, and go."""
    requests, rng, seen = Requests(proposer), Random(0), []
    draws = proposer.config.draft_sample_method == "probabilistic"
    for step in range(num_steps):
        idle = set(range(proposer.cache.num_slots)) - requests.contexts.keys()
        while idle and (rng.random() < 0.5 or not requests.contexts):
            requests.start(idle.pop(), rng.choice([2, 9, 70]), seed=step)
        slots = rng.sample(
            sorted(requests.contexts), rng.randint(1, len(requests.contexts))
        )
        # Who drafts must do so in every step, see ``DraftProposer.draft``.
        for slot in requests.contexts.keys() - set(slots):
            requests.release(slot)
        temperatures = top_k = None
        if draws and rng.random() < 0.7:
            temperatures = [rng.choice([0.0, 0.7, 1.5]) for _ in slots]
            if rng.random() < 0.5:
                top_k = [rng.choice([0, 3, 20]) for _ in slots]
        num_drafts = rng.randint(1, proposer.max_drafts)
        drafts = requests.drafts(slots, num_drafts, temperatures, top_k)
        seen += [x for x in drafts if x is not None]
        for slot, tokens in zip(slots, drafts.tokens.tolist(), strict=True):
            requests.verify(slot, tokens)
    return seen


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_graphs_draft_what_the_loop_drafts(drafter_folder, settings):
    """Through evictions, with rows that pad a batch, and any slots in any order."""
    expected = history(build(drafter_folder, **settings), 60)
    found = history(captured(drafter_folder, **settings), 60)
    torch.testing.assert_close(found, expected)


def test_graphs_of_kernels_draft_what_the_loop_drafts(drafter_folder, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings = {
        "attention_backend": "triton",
        "num_slots": 2,
        "num_speculative_tokens": 2,
        **SETTINGS["heavy_hitter_relative"],
        **SETTINGS["drawn"],
    }
    expected = history(build(drafter_folder, **settings), 3)
    found = history(captured(drafter_folder, **settings), 3)
    torch.testing.assert_close(found, expected)


def test_a_replay_runs_none_of_our_code_and_allocates_nothing_itself(
    drafter_folder, monkeypatch
):
    expected = history(build(drafter_folder), 5)
    proposer = captured(drafter_folder)
    for each in ("draft", "_places", "_attention"):
        monkeypatch.delattr(DraftLoop, each)
    draft = proposer._calls._graphs.draft

    def watched(*args):
        with forbid_allocation():
            return draft(*args)

    proposer._calls._graphs.draft = watched
    torch.testing.assert_close(history(proposer, 5), expected)


def test_a_length_of_no_graph_takes_the_next_longer_one(drafter_folder):
    settings = {"adaptive_draft_length": False}
    proposers = []
    for graphs in (False, True):
        proposer = build(drafter_folder, **settings)
        assert draft_lengths(proposer.config) == [4]
        if graphs:
            assert proposer.capture_graphs(FakeGraph) == 3 * 5  # kinds and sizes
        requests = Requests(proposer)
        requests.start(1, 30)
        requests.start(3, 50, seed=1)
        proposers.append(requests.drafts([3, 1], 3))
    torch.testing.assert_close(*proposers)


def test_one_that_captured_nothing_drafts_as_before(drafter_folder):
    def refuse(function):
        raise RuntimeError("out of memory")

    expected = history(build(drafter_folder), 5)
    proposer = build(drafter_folder)
    with pytest.raises(RuntimeError):
        proposer.capture_graphs(refuse)
    torch.testing.assert_close(history(proposer, 5), expected)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().cpu(),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: range(x.long().sum()),
        lambda x: torch.repeat_interleave(x, x.long()),
    ],
    ids=range(9),
)
def test_a_fake_graph_refuses_what_waits_for_the_device(work):
    """The test of the test."""
    with pytest.raises(GraphError):
        FakeGraph(lambda: work(torch.ones(3)))


def test_a_fake_graph_holds_addresses_and_not_what_they_held():
    given, out, offset = torch.zeros(3), torch.zeros(3), [1.0]

    def work() -> None:
        kept = given.clone() * 2
        out.copy_((kept + offset[0]).flip(0))

    graph = FakeGraph(work)
    given.copy_(torch.tensor([1.0, 2.0, 3.0]))
    offset[0] = 100.0  # Python is not looked at again
    graph()
    assert out.tolist() == [7.0, 5.0, 3.0]


def test_what_allocates_is_seen():
    x = torch.zeros(3)
    with forbid_allocation(), pytest.raises(GraphError):
        x + 1
    with forbid_allocation():
        x.add_(1)[1:].fill_(0)
