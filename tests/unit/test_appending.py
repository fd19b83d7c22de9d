"""Tokens that came without drafts, and drafts of fewer tokens."""

from collections.abc import Iterator
from random import Random

import pytest
import torch

from tests.support.drafting import (
    Requests,
    build_proposer,
    held_by,
    ingested,
    is_greedy,
)
from tests.support.models import VOCAB_SIZE, random_tokens
from tests.support.policies import EVERY_SECOND
from tests.support.slow_twin import SlowTwin
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH

PROMPT_TOKENS = [2, 3, 17, 150]


def catch_up(requests: Requests, rng: Random) -> Iterator[tuple[int, int, int]]:
    """Lets every context grow, and feeds that in calls of any width for any slots.

    Yields:
        Slot, first position and width of all that was fed.
    """
    missing = {}
    for slot, context in requests.contexts.items():
        start = len(context) - FIRST_WIDTH
        count = rng.choice([0, 1, 2, 9, 40])
        context += [rng.randrange(VOCAB_SIZE) for _ in range(count)]
        missing[slot] = range(start, len(context) - FIRST_WIDTH)
    while behind := [slot for slot in missing if missing[slot]]:
        widest = min(len(missing[rng.choice(behind)]), requests.proposer.max_append)
        width = rng.choice([1, rng.randint(1, widest), widest])
        able = [slot for slot in behind if len(missing[slot]) >= width]
        starts = {
            slot: missing[slot].start
            for slot in rng.sample(able, rng.randint(1, len(able)))
        }
        requests.append(starts, width)
        for slot, start in starts.items():
            missing[slot] = missing[slot][width:]
            yield slot, start, width


@pytest.mark.parametrize("num_drafts", [1, 4, 40])
def test_after_tokens_without_drafts_drafts_are_greedy_generation(
    drafter_folder, hugging_face_drafter, num_drafts
):
    """From a cache that holds everything; 40 drafts are more than one call feeds."""
    proposer = build_proposer(
        drafter_folder,
        num_slots=4,
        max_model_len=1000,
        eviction_policy="keep_all",
        num_speculative_tokens=num_drafts,
    )
    assert proposer.max_append == min(num_drafts + 1, 32)
    requests, rng, widths = Requests(proposer), Random(0), set()
    for slot, prompt_tokens in enumerate(PROMPT_TOKENS):
        requests.start(slot, prompt_tokens, seed=slot)
    for _ in range(8):
        widths |= {width for _, _, width in catch_up(requests, rng)}
        for slot, drafts in requests.draft([2, 0, 3, 1]).items():
            context = requests.contexts[slot]
            assert is_greedy(hugging_face_drafter, context, drafts), (slot, context)
            requests.verify(slot, drafts)
    assert {1, proposer.max_append} <= widths


@pytest.mark.parametrize("width", [1, 2, 5])
def test_tokens_leave_the_same_keys_and_values_fed_or_drafted(drafter_folder, width):
    """The context goes on the same, whatever is drafted."""
    tokens = random_tokens(60)
    # In float64, for products of other shapes round in other ways.
    drafted, fed = (
        build_proposer(drafter_folder, num_slots=2, dtype=torch.float64)
        for _ in range(2)
    )
    for proposer in (drafted, fed):
        ingested(proposer, tokens[:30], slot=1)
    requests = Requests(drafted)
    for end in range(32, 61):
        requests.contexts[1] = tokens[:end].tolist()
        requests.draft([1])
    requests = Requests(fed)
    requests.contexts[1] = tokens.tolist()
    for start in range(30, 60, width):
        requests.append({1: start}, width)
    for one, other in zip(held_by(drafted, 1, 60), held_by(fed, 1, 60), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


SETTINGS = {
    "chunk_retrieval": {},
    "odd_sizes": {"kv_budget": 45, "page_size": 7, "recent_window": 23},
    "pages_of_one": {"page_size": 1},
    "of_the_user": {"eviction_policy": EVERY_SECOND},
    "heavy_hitter": {"eviction_policy": "heavy_hitter"},
    "heavy_hitter_in_pages_of_one": {"eviction_policy": "heavy_hitter", "page_size": 1},
    "relative": {"position_mode": "cache_relative", "draft_prefill_chunk": 64},
    "relative_heavy_hitter": {
        "position_mode": "cache_relative",
        "draft_prefill_chunk": 64,
        "eviction_policy": "heavy_hitter",
    },
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS.keys())
def test_feeding_evicts_and_counts_as_over_an_explicit_list_of_keys(
    drafter_folder, hugging_face_drafter, changes
):
    settings = {
        "num_speculative_tokens": 3,
        "kv_budget": 40,
        "page_size": 8,
        "recent_window": 20,
        **changes,
    }
    proposer = build_proposer(
        drafter_folder, num_slots=4, max_model_len=1000, **settings
    )
    requests, twins, rng = Requests(proposer), [], Random(0)
    for slot, prompt_tokens in enumerate(PROMPT_TOKENS):
        requests.start(slot, prompt_tokens, seed=slot)
        twin = SlowTwin(hugging_face_drafter, proposer.policy, proposer.config, 1000)
        twin.ingest(torch.tensor(requests.contexts[slot][:-FIRST_WIDTH]))
        twins.append(twin)
    evicted_by_feeding = set()
    goal = PROMPT_TOKENS[0] + 6 * proposer.config.recent_window
    while len(requests.contexts[0]) < goal or len(evicted_by_feeding) < 4:
        for slot, start, width in catch_up(requests, rng):
            num_evicted = twins[slot].num_evicted
            twins[slot].append(requests.contexts[slot], start, width)
            if twins[slot].num_evicted > num_evicted:
                evicted_by_feeding.add(slot)
        num_drafts = rng.randint(1, 3)
        for slot, drafts in requests.draft([2, 0, 3, 1], num_drafts).items():
            context = requests.contexts[slot]
            assert drafts == twins[slot].draft(context, num_drafts), (slot, context)
            assert int(proposer.cache.num_evicted[slot]) == twins[slot].num_evicted
            if proposer.cache.received is not None:
                received = proposer.cache.received[slot]
                torch.testing.assert_close(
                    received, twins[slot].attention, rtol=1e-5, atol=1e-3
                )
            requests.verify(slot, drafts)
        proposer.cache.check_invariants()


@pytest.mark.parametrize("policy", ["keep_all", "chunk_retrieval"])
def test_a_shorter_draft_is_the_beginning_of_a_longer_one(drafter_folder, policy):
    proposer = build_proposer(
        drafter_folder,
        num_slots=4,
        eviction_policy=policy,
        num_speculative_tokens=6,
        kv_budget=40,
    )
    requests, slots = Requests(proposer), [3, 1, 0, 2]
    for slot, prompt_tokens in enumerate(PROMPT_TOKENS):
        requests.start(slot, prompt_tokens, seed=slot)
    longest = requests.drafts(slots)
    assert longest.tokens.shape == longest.confidences.shape == (4, 6)
    for num_drafts in (1, 2, 5, 6):
        shorter = requests.drafts(slots, num_drafts)
        assert shorter.tokens.tolist() == longest.tokens[:, :num_drafts].tolist()
        torch.testing.assert_close(
            shorter.confidences, longest.confidences[:, :num_drafts]
        )
