"""The promise of bounded memory, counted in the tensors themselves."""

import pytest
import torch

from tests.support.drafting import Requests, build_proposer
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer, MemoryPlan

NUM_SLOTS = 3
#: 3 layers, 2 KV heads, head size 10, keys and values.
NUMBERS_PER_TOKEN = 2 * 3 * 2 * 10


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
    ],
)
def test_the_pool_is_slots_times_capacity_times_bytes_per_token(
    drafter_folder, dtype, settings, max_model_len, capacity
):
    sizes = {"num_slots": NUM_SLOTS, "max_model_len": max_model_len, "dtype": dtype}
    proposer = build_proposer(drafter_folder, **sizes, **settings)
    per_token = NUMBERS_PER_TOKEN * dtype.itemsize
    assert pool_bytes(proposer) == NUM_SLOTS * capacity * per_token

    cache = proposer.cache
    assert cache.capacity == capacity
    assert cache.pool.num_bytes == pool_bytes(proposer)
    assert cache.bytes_per_token == per_token
    assert cache.bytes_per_slot == capacity * per_token

    plan = MemoryPlan.of(proposer.config, proposer.drafter.config, **sizes)
    assert plan.cache == pool_bytes(proposer)
    assert plan.cache_per_request == capacity * per_token
    assert plan.full_cache_per_request == max_model_len * per_token
    assert plan.prompt_scratch == proposer.prompt.num_bytes


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
