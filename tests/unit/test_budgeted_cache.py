"""The draft cache, watched from outside: each cell holds the number of its token."""

import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.cache.page_pool import PagePool
from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.errors import PagePoolExhaustedError

CPU = torch.device("cpu")


class NumberedCache:
    """A cache into which each token writes its number, and a drafting loop over it.

    Tokens that a prompt keeps are numbered 0, 1, ..., whatever their true position.
    """

    def __init__(
        self,
        *,
        budget: int,
        page_size: int,
        k: int,
        num_slots: int = 1,
        by_attention: bool = False,
    ) -> None:
        config = SettledConfig(
            model="unused",
            num_speculative_tokens=k,
            kv_budget=budget,
            recent_window=k + 2 * page_size,  # the least that is allowed
            page_size=page_size,
        )
        self.config, self.k = config, k
        self.capacity = config.cache_capacity(100_000)
        pool = PagePool(
            num_layers=2,
            num_pages=num_slots * self.capacity // page_size,
            page_size=page_size,
            num_kv_heads=1,
            head_dim=1,
            dtype=torch.float32,
            device=CPU,
        )
        self.cache = BudgetedCache(
            pool,
            num_slots=num_slots,
            capacity=self.capacity,
            protected_tokens=budget,
            max_growth=k + 1,
            evicts_by_attention=by_attention,
        )
        self.protected = -(-budget // page_size) * page_size
        self.lengths: dict[int, int] = {}
        self.dropped_by_policy: dict[int, int] = {}

    def start(self, slot: int, kept: int, seen: int, **sizes: int) -> None:
        """Loads a prompt of ``seen`` tokens; two more make the context."""
        self.cache.start_request(slot, **sizes)
        numbers = torch.full((2, seen, 1, 1), torch.nan)
        last = torch.arange(seen - kept, seen)
        numbers[:, last, 0, 0] = torch.arange(kept).float()
        attention = torch.zeros(2, 1, seen)
        self.cache.load_prompts(
            [slot], numbers, -numbers, [last.expand(2, 1, -1)], [seen], attention
        )
        self.lengths[slot] = seen + 2
        self.dropped_by_policy[slot] = seen - kept

    def release(self, slot: int) -> None:
        self.cache.release_request(slot)
        del self.lengths[slot]

    def draft(self, slots: list[int]) -> None:
        """Feeds two tokens and all drafts but the last, as ``DraftProposer`` does."""
        cache, k = self.cache, self.k
        slots_t = torch.tensor(slots)
        ends = torch.tensor([self.lengths[slot] for slot in slots])
        cache.make_room(slots_t, ends + k - 1)
        positions = ends[:, None] + torch.arange(-2, k - 1)
        indices = positions - cache.num_evicted[slots_t, None]
        assert (indices >= 0).all(), "a token about to be fed was evicted"
        assert (indices < self.capacity).all(), "a write would pass the capacity"
        assert (indices[:, 0] >= 0).all()
        dropped = torch.tensor([self.dropped_by_policy[slot] for slot in slots])
        numbers = (positions - dropped[:, None]).float()
        cells = cache.page_table.cells(slots_t, indices, cache.page_size)
        self._cells(cache.pool.keys)[:, cells] = numbers
        self._cells(cache.pool.values)[:, cells] = -numbers

    def verify(self, slot: int, accepted: int) -> None:
        """The context grows by the accepted drafts and the bonus token."""
        self.lengths[slot] += accepted + 1

    def held(self, slot: int) -> list[int]:
        """Numbers of the tokens in the cache, in its order; less the last two."""
        cache = self.cache
        count = self.lengths[slot] - 2 - int(cache.num_evicted[slot])
        cells = cache.page_table.cells(
            torch.tensor([slot]), torch.arange(count)[None], cache.page_size
        )[0]
        keys = self._cells(cache.pool.keys)[:, cells]
        assert torch.equal(keys, -self._cells(cache.pool.values)[:, cells])
        assert torch.equal(keys[0], keys[1]), "layers disagree"
        return keys[0].int().tolist()

    def check(self, slot: int) -> None:
        """The protected tokens, then an unbroken run up to the end of the context."""
        held = self.held(slot)
        total = self.lengths[slot] - 2 - self.dropped_by_policy[slot]
        gone = total - len(held)
        protected = min(self.protected, len(held)) if gone else len(held)
        assert held == [*range(protected), *range(protected + gone, total)]
        window = self.config.recent_window - self.k - self.config.page_size
        assert len(held) >= min(total, self.config.kv_budget + window)

    @staticmethod
    def _cells(pages: Tensor) -> Tensor:
        return pages.flatten(1)


SIZES = pytest.mark.parametrize(
    ("page_size", "budget", "k"),
    [(16, 64, 4), (8, 61, 3), (16, 100, 1), (8, 40, 21), (16, 17, 40), (1, 16, 5)],
    ids=lambda value: str(value),
)


@SIZES
@pytest.mark.parametrize("kept_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("accepted", ["none", "all", "random"])
def test_a_long_generation_keeps_the_protected_tokens_and_the_latest(
    page_size, budget, k, kept_share, accepted
):
    numbered = NumberedCache(budget=budget, page_size=page_size, k=k)
    kept = int(budget * kept_share)
    numbered.start(0, kept, seen=kept + 1000 * (kept == budget))
    rng = random.Random(0)
    while numbered.lengths[0] - 2 - numbered.dropped_by_policy[0] < (
        4 * numbered.capacity
    ):
        numbered.draft([0])
        numbered.check(0)
        choice = {"none": 0, "all": k, "random": rng.randint(0, k)}[accepted]
        numbered.verify(0, choice)
        numbered.check(0)
    assert int(numbered.cache.num_evicted[0]) > numbered.dropped_by_policy[0]


def test_a_context_within_the_capacity_is_never_evicted():
    numbered = NumberedCache(budget=64, page_size=16, k=4)
    numbered.start(0, kept=64, seen=64)
    while numbered.lengths[0] + numbered.k - 1 <= numbered.capacity:
        numbered.draft([0])
        assert int(numbered.cache.num_evicted[0]) == 0
        numbered.verify(0, 0)


def test_rejected_drafts_are_gone_once_their_positions_are_written_again():
    numbered = NumberedCache(budget=16, page_size=8, k=6)
    numbered.start(0, kept=16, seen=16)
    numbered.draft([0])
    numbered.cache.pool.keys[numbered.cache.pool.keys > 17] = 1e6  # wrong drafts
    numbered.cache.pool.values[numbered.cache.pool.values < -17] = -1e6
    numbered.verify(0, accepted=0)
    numbered.draft([0])
    numbered.verify(0, accepted=6)
    numbered.check(0)


def test_a_random_walk_over_slots_keeps_every_page_and_every_token_in_its_place():
    num_slots = 5
    numbered = NumberedCache(budget=44, page_size=8, k=5, num_slots=num_slots)
    rng = random.Random(0)
    for _ in range(600):
        active = list(numbered.lengths)
        idle = [slot for slot in range(num_slots) if slot not in active]
        move = rng.random()
        if idle and move < 0.08:
            kept = rng.randint(0, 44)
            seen = kept + rng.choice([0, 1, 3000]) * (kept == 44)
            numbered.start(rng.choice(idle), kept, seen)
        elif active and move < 0.11:
            numbered.release(rng.choice(active))
        elif active:
            batch = rng.sample(active, rng.randint(1, len(active)))
            numbered.draft(batch)
            for slot in batch:
                numbered.verify(slot, rng.randint(0, 5))
        numbered.cache.check_invariants()
        for slot in numbered.lengths:
            numbered.check(slot)


def test_a_slot_that_was_used_before_starts_empty():
    numbered = NumberedCache(budget=16, page_size=8, k=3)
    numbered.start(0, kept=16, seen=500)
    numbered.release(0)
    numbered.start(0, kept=3, seen=3)
    numbered.draft([0])
    assert numbered.held(0) == [0, 1, 2]


def test_requests_beyond_the_pages_are_refused_and_leave_nothing_behind():
    numbered = NumberedCache(budget=16, page_size=8, k=3, num_slots=2)
    cache = numbered.cache
    cache.pool.take(1)
    numbered.start(0, kept=1, seen=1)
    with pytest.raises(PagePoolExhaustedError):
        cache.start_request(1)
    cache.release_all()
    assert cache.pool.num_free == cache.pool.num_pages - 1


def test_release_all_frees_every_page():
    numbered = NumberedCache(budget=16, page_size=8, k=3, num_slots=3)
    for slot in (0, 2):
        numbered.start(slot, kept=1, seen=1)
    numbered.cache.release_all()
    numbered.cache.check_invariants()
    assert numbered.cache.pool.num_free == numbered.cache.pool.num_pages


def test_a_slot_costs_its_capacity_in_bytes():
    numbered = NumberedCache(budget=16, page_size=8, k=3, num_slots=3)
    cache = numbered.cache
    assert cache.bytes_per_token == 2 * 2 * 4  # K and V, two layers, float32
    spare_page = 8 * cache.bytes_per_token
    assert 3 * cache.bytes_per_slot + spare_page == cache.pool.num_bytes


def share_a_page(cache: BudgetedCache) -> None:
    cache.page_table.pages[0, 0] = cache.page_table.pages[1, 0]


def repeat_a_page(cache: BudgetedCache) -> None:
    cache.page_table.pages[1, 0] = cache.page_table.pages[1, 1]


def lose_a_page(cache: BudgetedCache) -> None:
    cache.pool.take(1)


def free_a_page_twice(cache: BudgetedCache) -> None:
    cache.pool.give_back([cache.pool.free_pages()[0]])


def free_a_held_page(cache: BudgetedCache) -> None:
    cache.pool.give_back([int(cache.page_table.pages[0, 0])])


def evict_below_zero(cache: BudgetedCache) -> None:
    cache.num_evicted[1] = -8


@pytest.mark.parametrize(
    "corrupt",
    [
        share_a_page,
        repeat_a_page,
        lose_a_page,
        free_a_page_twice,
        free_a_held_page,
        evict_below_zero,
    ],
)
def test_check_invariants_notices(corrupt):
    numbered = NumberedCache(budget=16, page_size=8, k=3, num_slots=3)
    for slot in (0, 1):
        numbered.start(slot, kept=16, seen=40)
    numbered.cache.check_invariants()
    corrupt(numbered.cache)
    with pytest.raises(AssertionError):
        numbered.cache.check_invariants()


def test_a_slot_of_smaller_capacity_holds_fewer_pages_and_evicts_within_them():
    numbered = NumberedCache(budget=64, page_size=16, k=4, num_slots=2)
    cache, pool = numbered.cache, numbered.cache.pool
    small = numbered.config.cache_capacity(100_000, budget=20)
    numbered.start(0, kept=20, seen=500, capacity=small, protected_tokens=20)
    assert pool.num_pages - pool.num_free == small // 16 < numbered.capacity // 16
    numbered.start(1, kept=64, seen=500)
    for _ in range(40):
        numbered.draft([0, 1])
        for slot in (0, 1):
            numbered.verify(slot, 2)
            assert len(numbered.held(slot)) <= (small, numbered.capacity)[slot]
        numbered.check(1)
        held = numbered.held(0)
        first, latest = held[:32], held[32:]
        assert first == list(range(len(first)))
        end = held[-1] + 1
        assert latest == list(range(end - len(latest), end))
        cache.check_invariants()
    assert int(cache.num_evicted[0]) > 480
    numbered.release(0)
    numbered.release(1)
    assert pool.num_free == pool.num_pages


def test_pages_that_received_least_go_first_and_the_younger_half_stays():
    numbered = NumberedCache(budget=64, page_size=8, k=4, by_attention=True)
    cache = numbered.cache
    # 12 pages: 8 of the prompt, of which one is protected; 5 of the others are older.
    numbered.start(0, kept=64, seen=64, protected_tokens=8)
    received = torch.tensor([0.0, 5, 1, 9, 2, 9, 3] + [100] * 5)
    assert len(received) == cache.pages_per_slot
    gone = []
    while numbered.lengths[0] < 64 + 2 + 8 * 8:
        cache.received[0] = received
        before = numbered.held(0)
        numbered.draft([0])
        gone += sorted(set(before) - set(numbered.held(0)))
        received = cache.received[0].clone()
        numbered.verify(0, 0)
    # Pages 2 and 4 of the prompt; then the sixth, which has moved among the older.
    assert gone[:16] == [*range(16, 24), *range(32, 40)]
    assert gone[16:24] == list(range(48, 56))
    assert set(range(8)) <= set(numbered.held(0))


def test_what_a_page_received_is_forgotten_with_it():
    numbered = NumberedCache(budget=64, page_size=8, k=4, by_attention=True)
    numbered.start(0, kept=64, seen=64, protected_tokens=8)
    numbered.cache.add_attention(
        torch.tensor([0]), torch.full((1, numbered.cache.pages_per_slot), 3.0)
    )
    numbered.release(0)
    numbered.start(0, kept=8, seen=8, protected_tokens=8)
    assert not numbered.cache.received.any()


def test_a_prompts_attention_is_counted_by_page():
    numbered = NumberedCache(budget=16, page_size=8, k=3, by_attention=True)
    numbered.cache.start_request(0)
    states = torch.zeros(2, 30, 1, 1)
    kept = torch.stack([torch.arange(3, 13), torch.arange(20, 30)])[:, None]
    attention = torch.arange(60.0).view(2, 1, 30)
    numbered.cache.load_prompts([0], states, states, [kept], [30], attention)
    first = sum(range(3, 11)) + sum(range(50, 58))
    second = 11 + 12 + 58 + 59
    found = numbered.cache.received[0]
    assert found[:3].tolist() == [first, second, 0]


class LargestTensor(TorchDispatchMode):
    """The most numbers in a tensor that an operation returned."""

    num_numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.num_numbers = max(self.num_numbers, found.numel())
        return found


def test_loading_takes_memory_for_what_is_kept_alone():
    """And not for a row of the page table beside each token."""
    kept = 600
    numbered = NumberedCache(budget=kept, page_size=1, k=2)
    with LargestTensor() as largest:
        numbered.start(0, kept=kept, seen=kept)
    assert numbered.cache.pages_per_slot > kept
    assert largest.num_numbers <= 4 * kept
