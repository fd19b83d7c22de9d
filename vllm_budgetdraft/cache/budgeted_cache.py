"""The draft cache: a fixed number of tokens per slot, however long the context."""

from types import ModuleType

import torch
from torch import Tensor

from budgetdraft_kernels import reference
from vllm_budgetdraft.cache.page_pool import PagePool
from vllm_budgetdraft.cache.page_table import PageTable
from vllm_budgetdraft.cache.ranges import packed_ranges


class BudgetedCache:
    """Keys and values of each slot's kept prompt, recent tokens and drafts.

    A slot's tokens lie in cache order: what was kept of the prompt, then every later
    token. Position ``p`` of the context that is not evicted lies at cache index
    ``p - num_evicted[slot]``, which is all the bookkeeping there is: committing
    accepted tokens and rolling rejected ones back both mean that the next write
    starts where the verified tokens end.

    Attributes:
        capacity: most tokens of a slot, a multiple of the page size.
        spare_slot: one that is nobody's. Many rows of a batch may name it; what they
            write is lost.
        num_evicted: [num_slots + 1] int64, context tokens that the cache dropped.
        attention: [num_slots + 1, pages_per_slot] float32, what each page of a slot has
            received; None unless eviction goes by it.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        num_slots: int,
        capacity: int,
        protected_tokens: int,
        max_growth: int,
        evicts_by_attention: bool = False,
        operations: ModuleType = reference,
    ) -> None:
        """
        Args:
            protected_tokens: first tokens of a slot that ``make_room`` never evicts,
                unless ``start_request`` says otherwise.
            max_growth: most tokens that a slot grows by between two calls of it.
            evicts_by_attention: whether it evicts the pages that received the least
                attention, of the older half, and not the oldest.
            operations: ``budgetdraft_kernels.reference`` or ``fused``.
        """
        page_size = pool.page_size
        assert capacity % page_size == 0, (capacity, page_size)
        device = pool.keys.device
        self.pool = pool
        self._operations = operations
        self.page_size = page_size
        self.capacity = capacity
        self.pages_per_slot = capacity // page_size
        self._protected_tokens = protected_tokens
        self._num_recycled = -(-max_growth // page_size)
        self.num_slots = self.spare_slot = num_slots
        self.page_table = PageTable(
            num_slots, self.pages_per_slot, pool.spare_page, device
        )
        self._places = torch.arange(self.pages_per_slot, device=device)
        shape = (num_slots + 1, self.pages_per_slot)
        self.num_evicted = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self._past_evictions = torch.zeros_like(self.num_evicted[:1])
        self._capacities = torch.full_like(self.num_evicted, capacity)
        self._evictable = torch.zeros(shape, dtype=torch.bool, device=device)
        self._unused = torch.zeros(shape, dtype=torch.bool, device=device)
        self.attention: Tensor | None = None
        if evicts_by_attention:
            self.attention = torch.zeros(shape, device=device)
        self._held: dict[int, list[int]] = {}

    @property
    def bytes_per_token(self) -> int:
        return self.pool.bytes_per_page // self.page_size

    @property
    def bytes_per_slot(self) -> int:
        return self.capacity * self.bytes_per_token

    @property
    def total_evicted(self) -> Tensor:
        """Context tokens that were ever dropped, [1] int64; nothing waits for it."""
        return self._past_evictions + self.num_evicted.sum()

    def forget_evictions(self) -> None:
        """Begins ``total_evicted`` anew; no slot may be held."""
        assert not self._held, self._held
        self._past_evictions.zero_()
        self.num_evicted.zero_()

    def is_held(self, slot: int) -> bool:
        return slot in self._held

    def start_request(
        self,
        slot: int,
        capacity: int | None = None,
        protected_tokens: int | None = None,
    ) -> None:
        """Gives an idle slot its pages; its cache is empty.

        Args:
            capacity: tokens, a multiple of the page size; the cache's if None.
            protected_tokens: first tokens that are never evicted; the cache's if None.

        Raises:
            PagePoolExhaustedError: too few pages are free.
        """
        assert slot not in self._held, slot
        if capacity is None:
            capacity = self.capacity
        if protected_tokens is None:
            protected_tokens = self._protected_tokens
        num_pages = capacity // self.page_size
        pages = self.pool.take(num_pages)
        self._held[slot] = pages
        self.page_table.assign(slot, pages)
        self._past_evictions += self.num_evicted[slot]
        self.num_evicted[slot] = 0
        self._capacities[slot] = capacity
        first = -(-protected_tokens // self.page_size)
        end = num_pages
        if self.attention is not None:
            self.attention[slot] = 0
            end = first + max((end - first) // 2, self._num_recycled)
        self._evictable[slot] = (self._places >= first) & (self._places < end)
        self._unused[slot] = self._places >= num_pages

    def release_request(self, slot: int) -> None:
        """Takes a slot's pages back."""
        self.pool.give_back(self._held.pop(slot))

    def scrub(self, slot: int) -> None:
        """Zeroes a slot's pages: what is not finite must not reach their next holder.

        Plain attention multiplies the values that it masks by zero.
        """
        pages = self.page_table.pages[slot, : len(self._held[slot])]
        for states in (self.pool.keys, self.pool.values):
            states.index_fill_(1, pages, 0)

    def release_all(self) -> None:
        for slot in list(self._held):
            self.release_request(slot)

    def load_prompts(
        self,
        slots: list[int],
        keys: Tensor,
        values: Tensor,
        kept: list[Tensor],
        seen: list[int],
        attention: Tensor | None = None,
    ) -> None:
        """Fills empty slots with what the policy kept of their first ``seen`` tokens.

        Args:
            keys, values: [num_layers, num_tokens, num_kv_heads, head_dim], of all.
            kept: of each slot [num_layers, num_kv_heads, num_kept] int64, rows of
                these.
            attention: [num_layers, num_kv_heads, num_tokens], what each received;
                needed where eviction goes by it.
        """
        lengths = [rows.shape[2] for rows in kept]
        for num_kept, num_seen in zip(lengths, seen, strict=True):
            assert num_kept <= min(num_seen, self.capacity), (num_kept, num_seen)
        index = packed_ranges(map(range, lengths), self.num_evicted.device)
        slot = torch.cat(
            [index.new_full((n,), slot) for slot, n in zip(slots, lengths, strict=True)]
        )
        rows = torch.cat(kept, 2)
        self._operations.page_compaction(
            keys,
            values,
            rows,
            self.pool.keys,
            self.pool.values,
            self.page_table.cells(slot, index[:, None], self.page_size)[:, 0],
            validate=False,
        )
        for each, num_seen, num_kept in zip(slots, seen, lengths, strict=True):
            self.num_evicted[each] = num_seen - num_kept
        if self.attention is not None:
            assert attention is not None
            received = attention.gather(2, rows).sum((0, 1))
            places = slot, index // self.page_size
            self.attention.index_put_(places, received, accumulate=True)

    def make_room(self, slots: Tensor, ends: Tensor) -> None:
        """Evicts whole pages where a slot could not hold its context up to ``ends``.

        Their page numbers move to the end of the table and are written anew, so that
        no data moves and no page changes hands.

        Args:
            slots: [B] int64.
            ends: [B] int64, positions one past the last that will be written.
        """
        evicted = self.num_evicted[slots]
        due = ends - evicted > self._capacities[slots]
        places = self._places.expand(len(slots), -1)
        merit = places.float() if self.attention is None else self.attention[slots]
        merit = merit.masked_fill(~self._evictable[slots], torch.inf)
        victims = merit.topk(self._num_recycled, largest=False).indices
        # Evicted pages come behind those in use, and both before places of no page.
        num_places = self.pages_per_slot
        later = self._unused[slots] * (2 * num_places)
        order = (places + later.scatter(1, victims, num_places)).argsort(-1)
        self.page_table.reorder(slots, due, order)
        self.num_evicted[slots] = evicted + due * (self._num_recycled * self.page_size)
        if self.attention is not None:
            received = self.attention[slots]
            left = received.scatter(1, victims, 0.0).gather(1, order)
            self.attention[slots] = torch.where(due[:, None], left, received)

    def add_attention(self, slots: Tensor, received: Tensor) -> None:
        """Counts what pages of the slots [B] received, [B, pages_per_slot]."""
        assert self.attention is not None
        self.attention[slots] += received

    def check_invariants(self) -> None:
        """Raises AssertionError if a page leaked, is held twice, or left its slot."""
        held = [page for pages in self._held.values() for page in pages]
        everything = sorted(held + self.pool.free_pages())
        assert everything == list(range(self.pool.num_pages)), "a page leaked or split"
        for slot in self._held:
            self.check_slot(slot)

    def check_slot(self, slot: int) -> None:
        """Raises AssertionError if a slot's bookkeeping is not that of its pages."""
        held = self._held[slot]
        row = self.page_table.pages[slot, : len(held)].tolist()
        assert sorted(row) == sorted(held), (
            f"slot {slot} lists pages {row}, and holds {held}"
        )
        assert self.num_evicted[slot] >= 0, f"slot {slot} evicted below zero"
