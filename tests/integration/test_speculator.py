"""The speculator of model runner V2, by itself: what it is asked, and what it answers.

``test_runner_v2`` has it in vLLM.
"""

import inspect
from typing import Any

import pytest
import torch

from tests.support.drafting import build_proposer
from tests.support.fake_graph import FakeGraph, forbid_host_reads
from tests.support.models import VOCAB_SIZE, random_tokens
from tests.support.policies import FAILS_ON_LONG_PROMPTS, POISONS_LONG_PROMPTS
from tests.support.speculator import (
    MAX_MODEL_LEN,
    NUM_DRAFTS,
    NUM_SLOTS,
    Runner,
)
from vllm_budgetdraft.vllm_integration.core_loader import capture_graphs

pytestmark = pytest.mark.vllm


def test_it_takes_what_vllm_hands_over():
    from vllm.v1.worker.gpu.spec_decode import init_speculator
    from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

    from vllm_budgetdraft.vllm_integration.v2.own_cache_speculator import (
        OwnCacheSpeculator,
    )

    for name in ("propose", "init_cudagraph_manager"):
        theirs = inspect.signature(getattr(BaseSpeculator, name)).parameters
        ours = inspect.signature(getattr(OwnCacheSpeculator, name)).parameters
        assert list(ours) == list(theirs), name
    assert list(inspect.signature(init_speculator).parameters) == [
        "vllm_config",
        "device",
        "req_states",
    ]
    assert not OwnCacheSpeculator.__abstractmethods__


def test_drafts_are_those_of_the_proposer(drafter_folder):
    runner = Runner(drafter_folder, draft_sample_method="greedy")
    alone = build_proposer(
        drafter_folder, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, kv_budget=64
    )
    runner.add(2, 100)
    context = random_tokens(100, seed=2).tolist()
    alone.start_request(0)
    alone.ingest(0, torch.tensor(context[:-1]))
    drafts = torch.zeros((1, 0), dtype=torch.int64)
    for num_accepted in (0, 0, 4, 2, 4):
        emitted = [*drafts[0, :num_accepted].tolist(), 9]
        runner.emit(2, emitted)
        context += emitted
        drafts = runner.propose([2], NUM_DRAFTS).clone()
        expected = alone.draft(
            torch.tensor([0]),
            torch.tensor([context[-2:]]),
            torch.tensor([len(context)]),
        )
        assert drafts.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize(
    ("temperature", "vocab_size"),
    [(0.5, VOCAB_SIZE), (1.0, VOCAB_SIZE + 9), (2.0, VOCAB_SIZE - 9)],
)
def test_vllm_is_told_what_each_token_was_drawn_from(
    drafter_folder, temperature, vocab_size, monkeypatch
):
    """Also of a target whose vocabulary is padded otherwise."""
    runner, drawn = Runner(drafter_folder, vocab_size), []
    pick = runner.core.operations.sampled_pick

    def noted(*args: Any, out: tuple, **kwargs: Any) -> tuple:
        assert out[2] is None, "nobody looks at distributions"
        drawn.append(pick(*args, **kwargs)[2])
        return pick(*args, out=out, **kwargs)

    monkeypatch.setattr(runner.core.operations, "sampled_pick", noted)
    runner.temperature[:] = temperature
    last = vocab_size - 1
    for index in (0, 1, 2):
        runner.add(index, 30 + index, temperature=temperature)
        runner.states.all_token_ids.gpu.clamp_(max=last)
        runner.emit(index, [last])
    runner.speculator._release(1)  # it drafts no more
    drafts = runner.propose([2, 1, 0])
    told = (runner.speculator.draft_logits / temperature).softmax(-1)
    assert told.isfinite().all()
    for row, index in enumerate((2, 1, 0)):
        chosen = told[index].gather(1, drafts[row][:, None])
        if index == 1:  # the last token, for certain
            assert drafts[row].tolist() == [last] * NUM_DRAFTS
            torch.testing.assert_close(chosen, torch.ones_like(chosen))
        else:
            assert not told[index, :, VOCAB_SIZE:].any()
    probabilities = torch.stack(drawn, 1)
    known = probabilities.shape[2]
    torch.testing.assert_close(told[[2, 0], :, :known], probabilities)
    assert not (probabilities > 0.99).any()  # else nothing was compared


def test_drafts_are_of_the_likeliest_that_a_request_asks_for(drafter_folder):
    runner = Runner(drafter_folder)
    for index, top_k in enumerate((2, 0, 5)):
        runner.add(index, 30 + index, top_k=top_k)
        runner.emit(index, [5])
    runner.propose([2, 1, 0])
    counts = (runner.speculator.draft_logits[:3] > -torch.inf).sum(-1)
    assert counts[0].tolist() == [2] * NUM_DRAFTS
    assert counts[1].tolist() == [VOCAB_SIZE] * NUM_DRAFTS
    assert counts[2].tolist() == [5] * NUM_DRAFTS


def test_of_greedy_requests_nothing_is_stored_for_nobody_reads_it(drafter_folder):
    """Unless they draft beside others, of whom some may not draft."""
    runner, none = Runner(drafter_folder), {"num_speculative_tokens": 0}
    runner.speculator.draft_logits.fill_(7.0)
    runner.add(0, 50, temperature=0.0)
    for temperature in (0.0, 1.0):
        assert (runner.speculator.draft_logits == 7.0).all()
        runner.add(1, 50, temperature=temperature, extra_args=none)
        for index in (0, 1):
            runner.emit(index, [5])
        runner.propose([0, 1])
        assert runner.speculator.drafted == {"request 0"}
    told = runner.speculator.draft_logits[:2].softmax(-1)
    assert (told.amax(-1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_seed_has_the_likeliest_drafted_and_that_is_said(drafter_folder, dtype):
    runner = Runner(drafter_folder, dtype=dtype)
    runner.add(0, 50, seed=1)
    runner.emit(0, [5])
    drafts = [runner.propose([0], NUM_DRAFTS).clone() for _ in range(2)]
    assert drafts[0].tolist() == drafts[1].tolist()
    told = (runner.speculator.draft_logits[0].float() / 0.01).softmax(-1)
    chosen = told.gather(1, drafts[1][0][:, None])
    torch.testing.assert_close(chosen, torch.ones_like(chosen))


@pytest.mark.parametrize("seed", [None, 1])
def test_logits_that_are_not_finite_leave_the_last_token(drafter_folder, seed):
    """For certain, and the likeliest of them, of which there is none, not as well."""
    runner = Runner(drafter_folder, eviction_policy=POISONS_LONG_PROMPTS)
    runner.add(0, 800, seed=seed)
    runner.add(1, 40)
    for index in (0, 1):
        runner.emit(index, [5])
    drafts = runner.propose([0, 1])
    assert drafts[0].tolist() == [5] * NUM_DRAFTS
    assert drafts[1].tolist() != [5] * NUM_DRAFTS
    told = runner.speculator.draft_logits[:2].softmax(-1)
    assert told.isfinite().all()
    assert (told[0, :, 5] == 1).all()


@pytest.mark.parametrize("graphs", [False, True])
def test_nothing_waits_for_the_device(drafter_folder, graphs, monkeypatch):
    """Neither drafts of everybody or of some, nor steps without drafts and after."""
    runner = Runner(drafter_folder)
    if graphs:
        capture_graphs(runner.core, FakeGraph)
        assert runner.core.num_graphs > 0
    for index in range(3):
        runner.add(index, 30 + index)
        runner.emit(index, [5])
    runner.propose([0, 1, 2])
    propose = runner.speculator.propose

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        with forbid_host_reads():
            return propose(*args, **kwargs)

    monkeypatch.setattr(runner.speculator, "propose", watched)
    for indices, length in (
        ([2, 0], NUM_DRAFTS),
        ([0, 1, 2], 0),
        ([1, 2], NUM_DRAFTS),
        ([0, 1], 2),
    ):
        for index in indices:
            runner.emit(index, [1, 2])
        runner.propose(indices, NUM_DRAFTS, length)


def test_whoever_has_no_drafts_is_counted_by_reason(drafter_folder):
    runner = Runner(
        drafter_folder,
        eviction_policy=FAILS_ON_LONG_PROMPTS,
        draft_prefill_chunk=100,
        # Of a bit more than two requests.
        pool_memory_gib=2.5 * (336 * 480) / 2**30,
    )

    counts = []

    def skipped(indices: list[int], length: int = NUM_DRAFTS) -> dict[str, float]:
        runner.propose(indices, 0, length)
        counts[:] = runner.speculator.take_statistics()["counts"]
        return {label: n for name, label, n in counts if name == "drafts_skipped"}

    runner.add(0, 90, extra_args={"num_speculative_tokens": 0})
    runner.add(1, 90)
    runner.add(2, 720)
    runner.add(3, 90)
    for index in range(NUM_SLOTS):
        runner.emit(index, [5])
    assert skipped([1], length=0) == {"draft_length": 1}
    runner.emit(1, [5])
    reasons = {"off": 1, "reading": 1, "no_pages": 1}
    assert skipped([0, 1, 2, 3]) == reasons
    assert ["steps_to_first_draft", "0", 1] in counts  # not that of no drafts
    for _ in range(8):
        assert skipped([2]) in ({"reading": 1}, {"failed": 1})
    assert skipped([2]) == {"failed": 1}
    faults = runner.speculator._faults.num_faults
    assert faults == 2  # one of them that there was no room


def never_repeats(drafts: torch.Tensor, token: int) -> bool:
    """Whether every row [B, k] was drafted, and not filled with its last token."""
    return bool((drafts != token).any(-1).all())


def test_a_request_without_room_drafts_as_soon_as_there_is_some(drafter_folder):
    """As if it had begun then: at once where another one ends, and no later."""
    alone = build_proposer(
        drafter_folder, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, kv_budget=64
    )
    requests = {2: 90, 3: 60}  # index and prompt
    room = 1.5 * alone.cache.pool.num_bytes / NUM_SLOTS / 2**30
    runner = Runner(drafter_folder, pool_memory_gib=room, draft_sample_method="greedy")
    for index, num_tokens in requests.items():
        runner.add(index, num_tokens)
    for token in range(5, 25):  # verified, and refused each time
        for index in requests:
            runner.emit(index, [token])
        drafts = runner.propose([2, 3], NUM_DRAFTS)
        assert never_repeats(drafts[:1], token)
        assert drafts[1].tolist() == [token] * NUM_DRAFTS
    assert runner.speculator._faults.num_faults == 1, "it is not tried in vain"
    runner.end(2)
    runner.emit(3, [25])
    drafted = runner.propose([3], NUM_DRAFTS)
    context = runner.states.all_token_ids.gpu[3, :81].long()
    alone.start_request(0)
    alone.ingest(0, context[:-2])
    expected = alone.draft(torch.tensor([0]), context[None, -2:], torch.tensor([81]))
    assert drafted.tolist() == expected.tokens.tolist()
    runner.core.cache.check_invariants()


def test_after_a_failure_of_no_request_all_begin_anew(drafter_folder, monkeypatch):
    runner = Runner(drafter_folder)
    for index in (0, 1):
        runner.add(index, 30)
        runner.emit(index, [5])

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    runner.propose([1, 0])
    for index in (0, 1):
        runner.emit(index, [5])
    with monkeypatch.context() as patch:
        patch.setattr(runner.core, "draft", fail)
        assert runner.propose([1, 0], NUM_DRAFTS).tolist() == [[5] * NUM_DRAFTS] * 2
        told = runner.speculator.draft_logits[:2].softmax(-1)
        assert (told[..., 5] == 1).all()
    assert runner.speculator._faults.num_faults == 1
    for index in (0, 1):
        runner.emit(index, [5])
    assert never_repeats(runner.propose([1, 0], NUM_DRAFTS), 5)
    runner.core.cache.check_invariants()


def test_a_failure_that_persists_ends_the_drafts_of_all_that_meet_it(
    drafter_folder, monkeypatch
):
    """Each costs a request all that it has read."""
    runner = Runner(drafter_folder)
    runner.add(0, 30)
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(runner.core, "draft", fail)
        for _ in range(6):
            runner.emit(0, [5])
            runner.propose([0], NUM_DRAFTS)
    assert len(calls) == 3
    runner.emit(0, [5])
    assert runner.propose([0]).tolist() == [[5] * NUM_DRAFTS]
    runner.add(1, 60)  # the next request drafts again
    runner.emit(1, [6])
    assert never_repeats(runner.propose([1]), 6)
    runner.core.cache.check_invariants()


def test_who_waits_for_pages_after_a_failure_is_counted_so(drafter_folder, monkeypatch):
    runner = Runner(drafter_folder)
    room = 1.5 * runner.core.cache.pool.num_bytes / NUM_SLOTS / 2**30
    runner = Runner(drafter_folder, pool_memory_gib=room)
    for index in (2, 3):
        runner.add(index, 60)
        runner.emit(index, [5])
    runner.propose([2, 3])  # 2 drafts, and 3 waits

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(runner.core, "draft", fail)
        for index in (2, 3):
            runner.emit(index, [5])
        runner.propose([3, 2], NUM_DRAFTS)
    runner.speculator.take_statistics()
    for index in (2, 3):
        runner.emit(index, [5])
    runner.propose([3, 2], NUM_DRAFTS)  # 3 comes first, and takes the room
    counts = runner.speculator.take_statistics()["counts"]
    skipped = {label: n for name, label, n in counts if name == "drafts_skipped"}
    assert skipped == {"no_pages": 1}
