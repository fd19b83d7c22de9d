"""The promise of bounded memory, counted in the tensors themselves."""

import pytest
import torch

from tests.support.drafting import Requests, build_proposer
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.memory import MemoryPlan

NUM_SLOTS = 3
#: 3 layers, 2 KV heads, head size 10, keys and values.
NUMBERS_PER_TOKEN = 2 * 3 * 2 * 10

RELATIVE = {"position_mode": "cache_relative", "draft_prefill_chunk": 300}


def bytes_in(*tensors: torch.Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def pool_bytes(proposer: DraftProposer) -> int:
    return bytes_in(proposer.cache.pool.keys, proposer.cache.pool.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("settings", "max_model_len", "capacity"),
    [
        ({"kv_budget": 40, "recent_window": 40}, 1_000, 96),  # 40 + 40 + 5
        ({"kv_budget": 40, "recent_window": 40}, 2_000, 96),
        ({"kv_budget": 43, "recent_window": 36, "page_size": 8}, 1_000, 88),
        ({"kv_budget": 40, "draft_prefill": "streaming"}, 1_000, 304),
        ({"eviction_policy": "keep_all"}, 500, 512),
        ({"eviction_policy": "heavy_hitter", "kv_budget": 40}, 1_000, 304),
        (RELATIVE | {"kv_budget": 40}, 5_000, 304),
    ],
)
def test_the_pool_is_slots_times_capacity_times_bytes_per_token(
    drafter_folder, dtype, settings, max_model_len, capacity
):
    sizes = {"num_slots": NUM_SLOTS, "max_model_len": max_model_len, "dtype": dtype}
    proposer = build_proposer(drafter_folder, **sizes, **settings)
    per_token = NUMBERS_PER_TOKEN * dtype.itemsize
    cache = proposer.cache
    num_tokens = NUM_SLOTS * capacity + cache.page_size  # of the spare page
    assert pool_bytes(proposer) == num_tokens * per_token
    assert cache.capacity == capacity
    assert cache.pool.num_bytes == pool_bytes(proposer)
    assert cache.bytes_per_token == per_token
    assert cache.bytes_per_slot == capacity * per_token

    plan = MemoryPlan.of(proposer.config, proposer.drafter.config, **sizes)
    assert plan.cache == pool_bytes(proposer)
    assert plan.cache_per_request == capacity * per_token
    assert plan.full_cache_per_request == max_model_len * per_token
    prompt = proposer.reader.prompt
    assert plan.prompt_scratch == bytes_in(prompt.keys, prompt.values)
    # In float32, the attention of each key: 3 layers, 2 KV heads.
    counts = 3 * 2 * 4 * prompt.max_tokens * ("heavy" in str(settings))
    assert prompt.num_bytes == plan.prompt_scratch + counts


def test_neither_long_contexts_nor_many_requests_make_the_pool_grow(drafter_folder):
    proposer = build_proposer(
        drafter_folder,
        num_slots=NUM_SLOTS,
        max_model_len=1_000,
        kv_budget=40,
        recent_window=36,
    )
    before = pool_bytes(proposer), proposer.cache.pool.keys.data_ptr()
    requests = Requests(proposer)
    for round_ in range(3):
        for slot in range(NUM_SLOTS):
            requests.start(slot, 300 * (round_ + 1), seed=slot)
        for _ in range(20):
            for slot, drafts in requests.draft(list(range(NUM_SLOTS))).items():
                requests.verify(slot, drafts)
        for slot in range(NUM_SLOTS):
            requests.release(slot)
    assert (pool_bytes(proposer), proposer.cache.pool.keys.data_ptr()) == before


#: 88 tokens of 480 bytes each, in pages of 8.
SMALL = {"kv_budget": 43, "recent_window": 36, "page_size": 8}


@pytest.mark.parametrize(
    ("num_bytes", "num_pages"), [(100_000, 25), (46_080, 11), (1e9, 33)]
)
def test_the_pool_takes_the_memory_it_is_given_or_less(
    drafter_folder, num_bytes, num_pages
):
    proposer = build_proposer(
        drafter_folder,
        num_slots=NUM_SLOTS,
        max_model_len=1_000,
        pool_memory_gib=num_bytes / 2**30,
        **SMALL,
    )
    assert proposer.cache.pool.num_pages == num_pages
    assert pool_bytes(proposer) == (num_pages + 1) * 8 * 480 <= num_bytes


def test_memory_that_holds_no_request_is_refused(drafter_folder):
    with pytest.raises(ConfigurationError) as refusal:
        build_proposer(
            drafter_folder, max_model_len=1_000, pool_memory_gib=3e-5, **SMALL
        )
    for part in ("pool_memory_gib=3e-05", "4.29e-05 GiB", "raise it", "kv_budget=43"):
        assert part in str(refusal.value)


def test_requests_draft_in_less_memory_as_far_as_it_goes(drafter_folder):
    """Two fit; a smaller budget takes fewer pages, so that a third one does."""
    proposer = build_proposer(
        drafter_folder,
        num_slots=NUM_SLOTS,
        max_model_len=1_000,
        pool_memory_gib=(28 + 1) * 8 * 480 / 2**30,
        **SMALL,
    )
    proposer.start_request(0)
    proposer.start_request(1)
    assert not proposer.has_room()
    assert proposer.has_room(kv_budget=1)
    proposer.start_request(2, kv_budget=1)
    assert proposer.cache.pool.num_free == 0
