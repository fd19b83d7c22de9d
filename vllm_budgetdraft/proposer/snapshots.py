"""What draft caches held of contexts that are over, for contexts that continue them.

A snapshot is the pages of a request that ended: they are not copied, and go to
whoever needs pages, the least recently used snapshot first. It serves a context of the
same scope that begins with its tokens, or with some of them: from ``whole_from`` on it
holds every token, so that it can be cut anywhere there.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.cache.detached_pages import Pages

#: Keys and values [num_layers, num_tokens, num_kv_heads, head_dim], and what each token
#: received [num_layers, num_kv_heads, num_tokens], if that is counted.
States = tuple[Tensor, Tensor, Tensor | None]
#: Tokens that are compared at once: most contexts differ early.
COMPARED = 4096


class Facts(NamedTuple):
    """What of a snapshot only the device knew when it was taken.

    Attributes:
        tokens: [n] int32, of the context, at least those that the cache knows.
        end: position of the context after the last that the cache knows.
        num_evicted: positions before it that the cache dropped.
        is_finite: whether all keys and values are.
        page_order: numbers of its pages in the order of tokens; empty for a shared
            beginning, whose pages are all in use.
    """

    tokens: np.ndarray
    end: int
    num_evicted: int
    is_finite: bool
    page_order: list[int]


@dataclass(eq=False)
class Snapshot:
    """
    Attributes:
        scope: which contexts it may serve.
        pages: what it holds.
        origin: of the context, the cache's position 0.
        tokens: of the context, as far as the host knew them.
        read: waits for the device, and tells what it knew; None when that is known.
        facts: that; None before.
        is_shared: whether it is of a beginning that many contexts may have.
    """

    scope: Hashable
    pages: Pages
    origin: int
    tokens: np.ndarray
    read: Callable[[], Facts] | None
    facts: Facts | None = None
    is_shared: bool = False

    def can_serve(self, tokens: np.ndarray, lag: int) -> bool:
        """False if it cannot, as far as is known without waiting."""
        common = _common(self.tokens, tokens)
        if common == len(self.tokens):
            return True
        return common - lag - self.origin >= max(self.pages.whole_at, 1)


class Match(NamedTuple):
    """What a snapshot spares a context.

    Attributes:
        num_seen: positions of the cache, from its origin on, that need not be read.
        num_held: of them, how many it holds.
        spared: position of the context up to which the snapshot knows it.
        whole_from: see ``BudgetedCache.begin_with``.
    """

    snapshot: Snapshot
    num_seen: int
    num_held: int
    spared: int
    whole_from: int


class SnapshotStore:
    """Snapshots in the free pages of a ``BudgetedCache``.

    Attributes:
        generation: of contexts that may be kept.
        num_pages: that they hold.
        num_evicted: snapshots that made room, since this was last set.
    """

    def __init__(self, cache: BudgetedCache, lag: int = 0) -> None:
        """
        Args:
            lag: how many tokens after a position the drafter reads at it.
        """
        self._cache, self._lag = cache, lag
        self._kept: dict[int, Snapshot] = {}  # the least recently used first
        self.generation = 0
        self.num_pages = self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(
        self,
        slot: int,
        scope: Hashable,
        tokens: np.ndarray,
        end: int | Tensor,
        *,
        origin: int = 0,
        later_tokens: Tensor | None = None,
    ) -> None:
        """Takes the pages of a slot, whose request is over; if it fails, none.

        Args:
            tokens: of its context, as far as the host knows them.
            end: position of the context up to which the slot's cache knows it; [] int
                if the device alone knows.
            later_tokens: [n] int, those that follow ``tokens``, on the device.
        """
        cache = self._cache
        pages = cache.pages_of(slot)
        if isinstance(end, int):
            end = torch.full((), end, device=pages.order.device)
        known = [end, cache.num_evicted[slot], cache.are_finite(pages)]
        parts = [torch.stack([each.to(torch.int64) for each in known]), pages.order]
        if later_tokens is not None:
            parts.append(later_tokens.to(torch.int64))
        copied, num_pages = _to_host(torch.cat(parts)), len(pages.held)

        def read() -> Facts:
            found = copied()
            ended, evicted, is_finite = found[:3].tolist()
            order, later = found[3 : 3 + num_pages], found[3 + num_pages :]
            all_tokens = np.append(tokens, later.astype(np.int32))
            return Facts(all_tokens, ended, evicted, bool(is_finite), order.tolist())

        snapshot = Snapshot(scope, cache.detach(slot), origin, tokens, read)
        self._add(snapshot)
        if not is_gpu(pages.order.device):
            self._facts(snapshot)  # which nobody has to wait for

    def keep_rows(
        self, scope: Hashable, tokens: np.ndarray, states: States, rows: Tensor
    ) -> None:
        """Copies what a policy kept of the beginning of a context, if there is room.

        Args:
            tokens: of that beginning.
            rows: [num_layers, num_kv_heads, num_kept] int64, of the states.
        """
        num_pages = -(-rows.shape[2] // self._cache.page_size)
        if not self.make_room(num_pages):
            return
        pages = self._cache.fill_pages(num_pages, *states, rows, len(tokens))
        facts = Facts(tokens, len(tokens), pages.num_evicted_then, True, [])
        self._add(Snapshot(scope, pages, 0, tokens, None, facts, is_shared=True))

    def match(
        self, scope: Hashable, tokens: np.ndarray, num_computed: int | None = None
    ) -> Match | None:
        """The snapshot that knows most of a context.

        Args:
            tokens: of the context, as many as may be known.
            num_computed: of a drafter that can read on from there alone, its position:
                what lies between is then as if evicted.
        """
        best: Match | None = None
        for snapshot in list(self._kept.values()):
            if snapshot.scope != scope or not snapshot.can_serve(tokens, self._lag):
                continue
            facts = self._facts(snapshot)
            if not facts.is_finite:
                self._drop(snapshot)
                continue
            spared = min(_common(facts.tokens, tokens) - self._lag, facts.end)
            if num_computed is not None:
                spared = min(spared, num_computed)
            num_known, end = spared - snapshot.origin, facts.end - snapshot.origin
            num_held = num_known - facts.num_evicted
            whole_from = snapshot.pages.whole_from(facts.num_evicted, end)
            if num_known < max(whole_from, 1) or num_held < 1:
                continue
            num_seen = num_known
            if num_computed is not None:
                num_seen = num_computed - snapshot.origin
            if num_seen > num_known:  # what lies between is missing
                whole_from = num_seen
            if best is None or spared > best.spared:
                best = Match(snapshot, num_seen, num_held, spared, whole_from)
        return best

    def take(self, slot: int, match: Match, capacity: int, protected: int) -> bool:
        """Begins a slot with what a snapshot holds, if there are pages.

        Of a copy; or with the snapshot's own pages, if there is no room and the context
        goes on where it ended, so that it will leave a snapshot in its place.
        """
        snapshot, cache = match.snapshot, self._cache
        num_pages = capacity // cache.page_size
        assert snapshot.facts is not None
        goes_on = snapshot.facts.end - match.spared < cache.page_size
        has_room = cache.pool.num_free >= num_pages
        self._remove(snapshot)  # so that it makes no room
        try:
            if not has_room and not (goes_on and not snapshot.is_shared):
                has_room = self.make_room(num_pages)
            num_own = 0 if has_room else len(snapshot.pages.held)
            if num_own > num_pages or not self.make_room(num_pages - num_own):
                self._add(snapshot)
                return False
            if has_room:
                self._add(snapshot)
                cache.start_request(slot, capacity, protected)
                cache.copy_pages(slot, snapshot.pages, match.num_held)
            else:
                cache.start_request(slot, capacity, protected, snapshot.pages)
            num_known = match.spared - snapshot.origin
            cache.begin_with(
                slot, match.whole_from, match.num_seen, match.num_held, num_known
            )
        except Exception:
            if cache.is_held(slot):
                cache.release_request(slot)
            elif id(snapshot) not in self._kept:
                cache.give_back(snapshot.pages, scrubs=True)
            raise
        return True

    def make_room(self, num_pages: int) -> bool:
        """Drops snapshots until ``num_pages`` are free; returns whether they are."""
        pool = self._cache.pool
        if pool.num_free + self.num_pages < num_pages:
            return False
        while pool.num_free < num_pages and self._kept:
            self._drop(next(iter(self._kept.values())))
            self.num_evicted += 1
        return pool.num_free >= num_pages

    def begin_generation(self, number: int) -> None:
        """Forgets snapshots of earlier generations, which serve no context to come."""
        if number > self.generation:
            self.generation = number
            self.forget_all()

    def forget_all(self) -> None:
        for snapshot in list(self._kept.values()):
            self._drop(snapshot)

    def _facts(self, snapshot: Snapshot) -> Facts:
        """What the device knew. Pages that hold nothing are free from then on."""
        if snapshot.facts is None:
            assert snapshot.read is not None
            snapshot.facts, snapshot.read = snapshot.read(), None
            facts = snapshot.facts
            snapshot.tokens = facts.tokens
            num_held = facts.end - snapshot.origin - facts.num_evicted
            num_used = -(-num_held // self._cache.page_size)
            num_spare = len(facts.page_order) - num_used
            if facts.is_finite and 0 < num_used and num_spare > 0:
                pages = self._cache.cut(snapshot.pages, facts.page_order, num_used)
                snapshot.pages = pages
                self.num_pages -= num_spare
        return snapshot.facts

    def _add(self, snapshot: Snapshot) -> None:
        self._kept[id(snapshot)] = snapshot
        self.num_pages += len(snapshot.pages.held)

    def _remove(self, snapshot: Snapshot) -> None:
        del self._kept[id(snapshot)]
        self.num_pages -= len(snapshot.pages.held)

    def _drop(self, snapshot: Snapshot) -> None:
        self._remove(snapshot)
        is_finite = snapshot.facts is not None and snapshot.facts.is_finite
        self._cache.give_back(snapshot.pages, scrubs=not is_finite)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two contexts begin with alike."""
    length = min(len(first), len(second))
    for start in range(0, length, COMPARED):
        end = min(start + COMPARED, length)
        differs = first[start:end] != second[start:end]
        if differs.any():
            return start + int(differs.argmax())
    return length


def _to_host(values: Tensor) -> Callable[[], np.ndarray]:
    """Copies without waiting; what is returned waits."""
    if not is_gpu(values.device):
        found = values.numpy()
        return lambda: found
    copied = torch.zeros(values.shape, dtype=values.dtype, pin_memory=True)
    copied.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> np.ndarray:
        event.synchronize()
        return copied.numpy().copy()

    return read
