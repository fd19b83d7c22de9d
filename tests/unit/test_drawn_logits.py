"""Logits that drafts are drawn from, told by slot: for model runner V2."""

import pytest
import torch
from torch import Tensor

from tests.support.drafting import Requests, build_proposer
from tests.support.fake_graph import FakeGraph
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.drawn_logits import CERTAIN, NEVER, DrawnLogits
from vllm_budgetdraft.proposer.memory import MemoryPlan

NUM_SLOTS, NUM_DRAFTS = 3, 4
#: Of a drafter, and of the logits that are stored of it.
DTYPES = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.bfloat16,
}
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def build(folder, dtype: torch.dtype = torch.float32) -> DraftProposer:
    return build_proposer(
        folder,
        num_slots=NUM_SLOTS,
        max_model_len=400,
        dtype=dtype,
        tells_logits=True,
    )


def drawn(proposer: DraftProposer) -> Tensor:
    """Logits of new requests in slots 2 and 0, [2, k, V]."""
    requests = Requests(proposer)
    requests.start(2, 30)
    requests.start(0, 50, seed=1)
    drafts = requests.drafts([2, 0], None, [1.0, 0.7], [0, 5])
    assert drafts.probabilities is None, "they would be held twice"
    return proposer.drawn_logits.logits[[2, 0]]


@every_type
def test_what_is_stored_is_what_tokens_are_drawn_from(
    drafter_folder, dtype, monkeypatch
):
    """To the last bit, so that no rounding makes a difference."""
    proposer, given = build(drafter_folder, dtype), []
    pick = proposer.operations.sampled_pick

    def noted(logits: Tensor, *args, **kwargs) -> tuple:
        given.append(logits.clone())
        return pick(logits, *args, **kwargs)

    monkeypatch.setattr(proposer.operations, "sampled_pick", noted)
    stored = drawn(proposer)
    assert stored.dtype == DTYPES[dtype]
    assert torch.equal(stored, torch.stack(given, 1))
    assert (stored[1] > NEVER).sum(-1).tolist() == [5] * NUM_DRAFTS
    assert not proposer.drawn_logits.logits[1].any(), "of a slot that did not draft"


def test_graphs_store_what_the_loop_stores(drafter_folder):
    """A row that fills a batch up stores for nobody."""
    expected = drawn(build(drafter_folder))
    proposer = build(drafter_folder)
    proposer.capture_graphs(FakeGraph)
    proposer.drawn_logits.logits[1] = 7.0
    assert torch.equal(drawn(proposer), expected)
    assert (proposer.drawn_logits.logits[1] == 7.0).all()


@every_type
def test_a_low_temperature_leaves_large_logits_their_differences(dtype):
    """Over it they are 1e8, where float32 has no room for any."""
    stored = DrawnLogits(1, 1, 4, dtype, torch.device("cpu"))
    logits = torch.tensor([[1e4, 1e4, 1e4 - 64, -1e4]]).to(dtype)
    stored.store(torch.tensor([0]), 0, logits)
    found = (stored.logits[0, 0].float() / 1e-4).softmax(-1)
    assert found.tolist() == [0.5, 0.5, 0.0, 0.0]


@every_type
@pytest.mark.parametrize("temperature", [1e-5, 1.0, 1e3])
def test_what_is_certain_has_all_the_probability(dtype, temperature):
    stored = DrawnLogits(2, 1, 6, dtype, torch.device("cpu"))
    slots, logits = torch.tensor([1, 0]), torch.randn(2, 5)
    logits[1, 3] = torch.nan
    stored.store(slots, 0, logits.to(dtype))
    tokens = torch.tensor([[2], [5]])  # of which the drafter has no logit
    stored.make_certain(slots, tokens, torch.tensor([[True], [True]]))
    found = (stored.logits[slots, 0].float() / temperature).softmax(-1)
    assert torch.equal(found, torch.eye(6)[tokens[:, 0]])
    stored.store_certain(slots, tokens.flip(0))
    found = (stored.logits[slots, 0].float() / temperature).softmax(-1)
    assert torch.equal(found, torch.eye(6)[tokens[:, 0].flip(0)])
    stored.store(slots, 0, torch.zeros(2, 5, dtype=dtype))
    assert not (stored.logits == CERTAIN).any(), "of an earlier step"


@every_type
def test_the_bill_has_them_once(drafter_folder, dtype):
    proposer = build(drafter_folder, dtype)
    logits = proposer.drawn_logits.logits
    plan = MemoryPlan.of(
        proposer.config,
        proposer.drafter.config,
        num_slots=NUM_SLOTS,
        max_model_len=400,
        dtype=dtype,
        tells_logits=True,
    )
    assert plan.distributions == logits.nbytes
    assert proposer.scratch_bytes == plan.prompt_scratch + logits.nbytes
