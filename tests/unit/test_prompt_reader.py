"""Prompts read together, in whatever pieces, are kept as if each were read alone."""

from random import Random

import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.drafting import build_proposer, held_by, ingested, positions_of
from tests.support.fake_gpu import cpus_are_gpus
from tests.support.fake_graph import forbid_host_writes
from tests.support.policies import EVERY_SECOND
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.eviction.base import EvictionPolicy, PromptStates
from vllm_budgetdraft.proposer.prompt_reader import PromptReader
from vllm_budgetdraft.proposer.warm_up import warm_up

POLICIES = {
    "keep_all": {"eviction_policy": "keep_all"},
    "chunk_retrieval": {},
    "last_queries": {"chunk_score": "last_queries"},
    "observation_window": {"eviction_policy": "observation_window"},
    "heavy_hitter": {"eviction_policy": "heavy_hitter"},
    "last_query": {"eviction_policy": "last_query"},
    "key_diversity": {"eviction_policy": "key_diversity"},
    "sink_window": {"eviction_policy": "sink_window"},
    "own": {"eviction_policy": EVERY_SECOND},
}
READING = {
    "full": {"draft_prefill": "full"},
    "streaming": {"draft_prefill": "streaming"},
    "relative": {"draft_prefill": "streaming", "position_mode": "cache_relative"},
}
NUM_SLOTS = 6
SIZES = {
    # float64, so that no rounding decides what is kept.
    "dtype": torch.float64,
    "num_slots": NUM_SLOTS,
    "max_model_len": 300,
    "kv_budget": 40,
    "page_size": 8,
    "recent_window": 24,
    "sink_tokens": 4,
    "chunk_size": 4,
    "local_tokens": 8,
    "observation_tokens": 7,
    "draft_prefill_chunk": 50,
}


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    return models.write_model(
        tmp_path_factory.mktemp("drafter"), models.llama(num_hidden_layers=2), seed=3
    )


def build(drafter, **settings):
    return build_proposer(drafter, **SIZES, **settings)


def kept(proposer, slot, num_tokens):
    """Everything that drafts of a slot depend on."""
    cache = proposer.cache
    num_evicted = int(cache.num_evicted[slot])
    keys, values = held_by(proposer, slot, num_tokens - num_evicted)
    attention = torch.zeros(1) if cache.received is None else cache.received[slot]
    return torch.tensor(num_evicted), keys, values, attention


@pytest.mark.parametrize("reading", READING)
@pytest.mark.parametrize("policy", POLICIES)
def test_prompts_read_together_are_kept_as_each_alone(drafter, policy, reading):
    """Of lengths around pages, pieces and the budget; some leave in the middle."""
    settings = POLICIES[policy] | READING[reading]
    if policy == "keep_all" and reading == "relative":
        settings |= {"draft_prefill": "full"}
    for seed in range(3):
        rng = Random(seed)
        lengths = [rng.choice([0, 1, 7, 40, 50, 51, 90, 140, 297]) for _ in range(6)]
        contexts = [models.random_tokens(n, seed=n + i) for i, n in enumerate(lengths)]
        together = build(drafter, **settings)
        passes = watch(together.reader)
        for slot, length in enumerate(lengths):
            together.start_reading(slot, length)
        left = rng.randrange(NUM_SLOTS)
        steps = 0
        while unread := [s for s in range(NUM_SLOTS) if together.reader.is_reading(s)]:
            if steps == 2:
                together.release_request(left)
                together.start_reading(left, lengths[left])
            there = [slot for slot in unread if rng.random() < 0.8] or unread
            limit = rng.choice([1, 30, 100, 400])
            assert together.read(there, positions_of(*contexts), limit) == {}
            steps += 1
        assert max(passes, default=1) > 1 or sum(lengths) < 2
        for slot, context in enumerate(contexts):
            alone = build(drafter, **settings)
            ingested(alone, context, slot)
            for ours, theirs in zip(
                kept(together, slot, len(context)),
                kept(alone, slot, len(context)),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
        together.cache.check_invariants()


def watch(reader: PromptReader) -> list[int]:
    """How many prompts each pass takes."""
    counts, original = [], reader._pass

    def counted(pieces, tokens, features):
        counts.append(len(pieces))
        original(pieces, tokens, features)

    reader._pass = counted
    return counts


def test_what_fits_into_a_pass_is_read_in_one(drafter):
    proposer = build(drafter, draft_prefill="full")
    passes = watch(proposer.reader)
    contexts = [models.random_tokens(8, seed=i) for i in range(6)]
    for slot in range(6):
        proposer.start_reading(slot, 8)
    proposer.read(range(6), positions_of(*contexts), 48)
    assert passes == [6]
    assert not any(map(proposer.reader.is_reading, range(6)))


def test_who_finds_no_room_in_the_buffer_waits_and_who_began_goes_on(drafter):
    """The buffer takes one of 300 tokens and a pass of 50."""
    proposer = build(drafter, draft_prefill="full")
    reader = proposer.reader
    assert reader.prompt.max_tokens == 350
    contexts = [models.random_tokens(n, seed=n) for n in (200, 160, 140)]
    for slot, context in enumerate(contexts):
        proposer.start_reading(slot, len(context))
    tokens_of = positions_of(*contexts)
    proposer.read([1, 2], tokens_of, 50)  # the first waits elsewhere
    proposer.read([0, 1, 2], tokens_of, 50)  # and now for 1, which has begun
    seen = [reader._readings[slot].num_seen for slot in range(3)]
    assert seen == [0, 100, 0]
    proposer.read([0, 1, 2], tokens_of, 10_000)
    assert not any(map(reader.is_reading, range(3)))


def test_one_that_fails_is_found_and_the_others_are_read(drafter, monkeypatch):
    proposer = build(drafter, draft_prefill="streaming")
    contexts = [models.random_tokens(n, seed=n) for n in (60, 170, 120)]
    select = proposer.policy.select

    def fails(states, budget):
        # The second piece of the second prompt is the first to hold as many.
        if states.num_tokens == 90 and reader._readings.keys() & {1}:
            segment = reader._readings[1].segment
            if segment is not None and segment.num_held == 90:
                raise RuntimeError("on purpose")
        return select(states, budget)

    reader = proposer.reader
    monkeypatch.setattr(proposer.policy, "select", fails)
    for slot, context in enumerate(contexts):
        proposer.start_reading(slot, len(context))
    failed = {}
    for _ in range(40):
        unread = [slot for slot in range(3) if reader.is_reading(slot)]
        failed |= proposer.read(unread, positions_of(*contexts), 30)
    assert list(failed) == [1]
    assert "on purpose" in str(failed[1])
    assert not any(map(reader.is_reading, range(3)))
    assert not reader.prompt._segments


class LeavesThePrompt(EvictionPolicy):
    """Its last position is that of no token."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        return states.positions(states.num_tokens - 9, states.num_tokens + 1)


def test_on_a_gpu_a_choice_is_not_looked_at_and_cannot_leave_the_prompt(
    drafter, monkeypatch
):
    """There an index out of range would end the process, and a look would wait."""
    own = {"eviction_policy": f"{__name__}:LeavesThePrompt"}
    context = models.random_tokens(90, seed=1)
    with pytest.raises(ValueError, match="do not ascend from 0 to below 90"):
        ingested(build(drafter, **own), context)
    with cpus_are_gpus():
        proposer = build(drafter, attention_backend="torch", **own)
        ingested(proposer, context)
        keys, _ = held_by(proposer, 0, 10)
        monkeypatch.setenv("BUDGETDRAFT_CHECK_INVARIANTS", "1")
        proposer.release_request(0)
        with pytest.raises(ValueError, match="do not ascend from 0 to below 90"):
            ingested(proposer, context)
    assert torch.equal(keys[:, 8], keys[:, 9])  # the last token, twice


@pytest.mark.parametrize("policy", ["last_queries", "heavy_hitter"])
def test_on_a_gpu_nothing_waits_for_what_the_host_would_copy_there(drafter, policy):
    """A copy begins when all is done that the device was given before."""
    proposer = build(drafter, **POLICIES[policy], **READING["relative"])
    contexts = [models.random_tokens(n, seed=n) for n in (170, 60, 60, 90)]

    def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
        return torch.cat([contexts[s][piece.start : piece.stop] for s, piece in pieces])

    with forbid_host_writes():
        for slot, context in enumerate(contexts):
            proposer.start_reading(slot, len(context))
        proposer.reader.read(range(4), tokens_of, 120)
        proposer.reader.read(range(4), tokens_of, 1000)
    assert not any(map(proposer.reader.is_reading, range(4)))


def test_warm_up_keeps_as_many_queries_as_prompts_ever_do(drafter, monkeypatch):
    """Theirs is the memory that many short prompts take, and one long one does not."""
    sizes = SIZES | {"dtype": torch.float32}
    proposer = build_proposer(drafter, **sizes, **POLICIES["observation_window"])
    prompt, num_queries = proposer.reader.prompt, []
    observe = prompt._observe

    def watched() -> None:
        num_queries.append(sum(prompt._last_lengths))
        observe()

    monkeypatch.setattr(prompt, "_observe", watched)
    warm_up(proposer)
    most = max(num_queries)
    contexts = [models.random_tokens(8, seed=i) for i in range(NUM_SLOTS)]
    for slot in range(NUM_SLOTS):
        proposer.start_reading(slot, 8)
    assert proposer.read(range(NUM_SLOTS), positions_of(*contexts), 1000) == {}
    assert max(num_queries) == most == 42


class ReshapesThePrompt(EvictionPolicy):
    """Knows [layers, heads, tokens, head_dim] and nothing else."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        layers, heads, num_tokens, _ = states.keys.shape
        kept = torch.arange(max(0, num_tokens - budget), num_tokens)
        return kept.expand(layers, heads, -1)


def test_a_policy_for_one_request_at_a_time_is_refused_at_start_up(drafter):
    name = f"{__name__}:ReshapesThePrompt"
    sizes = SIZES | {"dtype": torch.float32, "eviction_policy": name}
    sizes["draft_prefill_chunk"] = 100
    with pytest.raises(
        ConfigurationError,
        match="ReshapesThePrompt' fails where two requests hold as many tokens "
        r"\(ValueError: too many values to unpack .*\); let its select take",
    ):
        warm_up(build_proposer(drafter, **sizes))
    # With room for one request alone it is never asked about two.
    warm_up(build_proposer(drafter, **sizes | {"num_slots": 1}))
