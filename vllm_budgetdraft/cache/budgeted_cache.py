"""The draft cache: a fixed number of tokens per slot, however long the context."""

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from budgetdraft_kernels import reference
from vllm_budgetdraft.cache.detached_pages import Pages
from vllm_budgetdraft.cache.page_pool import PagePool
from vllm_budgetdraft.cache.page_table import PageTable
from vllm_budgetdraft.cache.ranges import packed_ranges, runs


class BudgetedCache:
    """Keys and values of each slot's kept prompt, recent tokens and drafts.

    A slot's tokens lie in cache order: what was kept of the prompt, then every later
    token. Position ``p`` of the context that is not evicted lies at cache index
    ``p - num_evicted[slot]``, which is all the bookkeeping there is: committing
    accepted tokens and rolling rejected ones back both mean that the next write
    starts where the verified tokens end. (Of a slot that is to serve others when it is
    done, ``Pages`` notes what it began with.)

    Attributes:
        capacity: most tokens of a slot, a multiple of the page size.
        spare_slot: one that is nobody's. Many rows of a batch may name it; what they
            write is lost.
        num_evicted: [num_slots + 1] int64, context tokens that the cache dropped.
        received: [num_slots + 1, pages_per_slot] float32, what each page of a slot has
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
        self.received: Tensor | None = None
        if evicts_by_attention:
            self.received = torch.zeros(shape, device=device)
        self._held: dict[int, list[int]] = {}
        #: Of slots, ``whole_at``, ``num_evicted_then`` and ``num_protected``.
        self._began: dict[int, tuple[int, int, int]] = {}
        self._kept: set[int] = set()  # pages that were detached

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
        pages: Pages | None = None,
    ) -> None:
        """Gives an idle slot its pages; its cache is empty.

        Args:
            capacity: tokens, a multiple of the page size; the cache's if None.
            protected_tokens: first tokens that are never evicted; the cache's if None.
            pages: that are to be the first of its, with what is in them: see
                ``begin_with``.

        Raises:
            PagePoolExhaustedError: too few pages are free.
        """
        assert slot not in self._held, slot
        if capacity is None:
            capacity = self.capacity
        if protected_tokens is None:
            protected_tokens = self._protected_tokens
        num_pages = capacity // self.page_size
        given = [] if pages is None else pages.held
        held = [*given, *self.pool.take(num_pages - len(given))]
        self._held[slot] = held
        self._kept.difference_update(given)
        self.page_table.assign(slot, held)
        if pages is not None:
            self.page_table.pages[slot, : len(given)] = pages.order
        self._past_evictions += self.num_evicted[slot]
        self.num_evicted[slot] = 0
        self._capacities[slot] = capacity
        first = -(-protected_tokens // self.page_size)
        end = num_pages
        if self.received is not None:
            self.received[slot] = 0
            if pages is not None and pages.received is not None:
                self.received[slot, : len(given)] = pages.received
            end = first + max((end - first) // 2, self._num_recycled)
        self._began[slot] = 0, 0, first * self.page_size
        self._evictable[slot] = (self._places >= first) & (self._places < end)
        self._unused[slot] = self._places >= num_pages

    def pages_of(self, slot: int) -> Pages:
        """What a slot has now."""
        held, received = self._held[slot], self.received
        return Pages(
            held,
            self.page_table.pages[slot, : len(held)].clone(),
            None if received is None else received[slot, : len(held)].clone(),
            *self._began[slot],
        )

    def detach(self, slot: int) -> Pages:
        """Takes a slot's pages off it, as they are; ``give_back`` frees them."""
        pages = self.pages_of(slot)
        del self._held[slot]
        self._kept.update(pages.held)
        return pages

    def give_back(self, pages: Pages, *, scrubs: bool) -> None:
        """Frees pages that no slot holds, zeroed if they are to be: see ``scrub``."""
        if scrubs:
            self._zero(pages.order)
        self._free(pages.held)

    def cut(self, pages: Pages, order: list[int], count: int) -> Pages:
        """Frees all but the first pages.

        Args:
            order: numbers of the pages in the order of tokens.
        """
        self._free(order[count:])
        received = None if pages.received is None else pages.received[:count]
        return replace(
            pages, held=order[:count], order=pages.order[:count], received=received
        )

    def _free(self, detached: list[int]) -> None:
        self._kept.difference_update(detached)
        self.pool.give_back(detached)

    def are_finite(self, pages: Pages) -> Tensor:
        """Whether all that pages hold is, [] bool; layer by layer, for memory."""
        layers = [x for layer in self.pool.layers for x in layer]
        return torch.stack([x[pages.order].isfinite().all() for x in layers]).all()

    def copy_pages(self, slot: int, pages: Pages, num_tokens: int) -> None:
        """Fills an empty slot's pages with the first tokens that others hold.

        See ``begin_with``.
        """
        count = -(-num_tokens // self.page_size)
        mine, theirs = self.page_table.pages[slot, :count], pages.order[:count]
        for layer in self.pool.layers:
            for states in layer:
                states[mine] = states[theirs]
        if self.received is not None:
            assert pages.received is not None
            self.received[slot, :count] = pages.received[:count]

    def begin_with(
        self,
        slot: int,
        whole_from: int,
        num_seen: int,
        num_held: int,
        num_known: int,
    ) -> None:
        """Says of an empty slot what the pages that it was given hold.

        Args:
            whole_from: position from which on every token is held.
            num_seen: positions that count as read.
            num_held: of them, those that are held.
            num_known: of them, those that were read; the rest counts as evicted now.
        """
        self._begin(slot, whole_from, num_seen - num_held)
        self._past_evictions -= num_known - num_held  # which were counted before
        if self.received is not None:
            self.received[slot, -(-num_held // self.page_size) :] = 0

    def _begin(self, slot: int, whole_from: int, num_evicted: int) -> None:
        self.num_evicted[slot] = num_evicted
        self._began[slot] = whole_from, num_evicted, self._began[slot][2]

    def fill_pages(
        self,
        num_pages: int,
        keys: Tensor,
        values: Tensor,
        received: Tensor | None,
        rows: Tensor,
        num_seen: int,
    ) -> Pages:
        """Pages of no slot, with some rows of a context's beginning.

        Args:
            keys, values, received, rows: see ``load_prompts``.
            num_seen: tokens of that beginning.

        Raises:
            PagePoolExhaustedError: too few pages are free.
        """
        index = torch.arange(rows.shape[2], device=self.num_evicted.device)
        places = index // self.page_size
        by_page = None
        if received is not None:
            by_page = torch.zeros(num_pages, device=index.device)
            by_page.index_add_(0, places, received.gather(2, rows).sum((0, 1)))
        held = self.pool.take(num_pages)
        try:
            order = packed_ranges(runs(held), index.device)
            self._operations.page_compaction(
                keys,
                values,
                rows,
                self.pool.keys,
                self.pool.values,
                order[places] * self.page_size + index % self.page_size,
                validate=False,
            )
        except Exception:
            self.pool.give_back(held)
            raise
        self._kept.update(held)
        num_kept = rows.shape[2]
        whole_at = 0 if num_kept == num_seen else num_seen
        return Pages(held, order, by_page, whole_at, num_seen - num_kept, 0)

    def states_of(self, slot: int, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of a slot's first tokens, and what each has received.

        Returns:
            [num_layers, count, num_kv_heads, head_dim] twice, and [count] float32 if
            eviction goes by it: of each page its mean.
        """
        index = torch.arange(count, device=self.num_evicted.device)
        row = self.page_table.pages[slot]
        cells = row[index // self.page_size] * self.page_size + index % self.page_size
        keys, values = (
            x.flatten(1, 2)[:, cells] for x in (self.pool.keys, self.pool.values)
        )
        received = None
        if self.received is not None:
            pages = index // self.page_size
            filled = (count - pages * self.page_size).clamp(max=self.page_size)
            received = self.received[slot, pages] / filled
        return keys, values, received

    def release_request(self, slot: int) -> None:
        """Takes a slot's pages back."""
        self.pool.give_back(self._held.pop(slot))

    def scrub(self, slot: int) -> None:
        """Zeroes a slot's pages: what is not finite must not reach their next holder.

        Plain attention multiplies the values that it masks by zero.
        """
        self._zero(self.page_table.pages[slot, : len(self._held[slot])])

    def _zero(self, pages: Tensor) -> None:
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
        received: Tensor | None = None,
    ) -> None:
        """Fills empty slots with what the policy kept of their first ``seen`` tokens.

        Args:
            keys, values: [num_layers, num_tokens, num_kv_heads, head_dim], of all.
            kept: of each slot [num_layers, num_kv_heads, num_kept] int64, rows of
                these.
            received: [num_layers, num_kv_heads, num_tokens], attention of each token;
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
            whole_from = 0 if num_kept == num_seen else num_seen
            self._begin(each, whole_from, num_seen - num_kept)
        if self.received is not None:
            assert received is not None
            self.received[slots] = 0
            kept_received = received.gather(2, rows).sum((0, 1))
            places = slot, index // self.page_size
            self.received.index_put_(places, kept_received, accumulate=True)

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
        worth = places.float() if self.received is None else self.received[slots]
        worth = worth.masked_fill(~self._evictable[slots], torch.inf)
        victims = worth.topk(self._num_recycled, largest=False).indices
        # Evicted pages come behind those in use, and both before places of no page.
        num_places = self.pages_per_slot
        later = self._unused[slots] * (2 * num_places)
        order = (places + later.scatter(1, victims, num_places)).argsort(-1)
        self.page_table.reorder(slots, due, order)
        self.num_evicted[slots] = evicted + due * (self._num_recycled * self.page_size)
        if self.received is not None:
            received = self.received[slots]
            left = received.scatter(1, victims, 0.0).gather(1, order)
            self.received[slots] = torch.where(due[:, None], left, received)

    def add_attention(self, slots: Tensor, received: Tensor) -> None:
        """Counts what pages of the slots [B] received, [B, pages_per_slot]."""
        assert self.received is not None
        self.received[slots] += received

    def check_invariants(self) -> None:
        """Raises AssertionError if a page leaked, is held twice, or left its slot."""
        held = [page for pages in self._held.values() for page in pages]
        everything = sorted([*held, *self._kept, *self.pool.free_pages()])
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
