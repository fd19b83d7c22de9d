"""What draft caches held of contexts that are over, for those that go on with them.

A snapshot is the pages of a request that ended: they are not copied, and go to
whoever needs pages, the least recently used snapshot first. It serves a context of the
same scope that begins with its tokens, all of them or some: what it holds from
``whole_from`` on is every token, so that it can be cut there.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache, Pages

#: Keys and values [num_layers, num_tokens, num_kv_heads, head_dim], and what each token
#: received [num_layers, num_kv_heads, num_tokens], if that is counted.
States = tuple[Tensor, Tensor, Tensor | None]


class Facts(NamedTuple):
    """What of a snapshot only the device knew when it was taken.

    Attributes:
        tokens: [n] int32, of the context, at least those that are covered.
        end: position after the last that the cache knows.
        num_evicted: positions before it that the cache dropped.
        is_finite: whether all keys and values are.
    """

    tokens: np.ndarray
    end: int
    num_evicted: int
    is_finite: bool


@dataclass(eq=False)
class Snapshot:
    """
    Attributes:
        scope: which contexts it may serve.
        origin: of the context, the cache's position 0.
        facts: waits for the device, if it must.
    """

    scope: Hashable
    pages: Pages
    origin: int
    facts: Callable[[], Facts]


class Match(NamedTuple):
    """What a snapshot spares a context.

    Attributes:
        num_seen: positions of the cache, from its origin on, that need not be read.
        num_held: of them, how many it holds.
        spared: tokens of the context that the snapshot knows.
        whole_from: see ``BudgetedCache.whole_from``.
    """

    snapshot: Snapshot
    num_seen: int
    num_held: int
    spared: int
    whole_from: int


class SnapshotStore:
    """Snapshots in the free pages of a ``BudgetedCache``.

    Attributes:
        num_evicted: snapshots that made room, since this was last set.
    """

    def __init__(self, cache: BudgetedCache, lag: int = 0) -> None:
        """
        Args:
            lag: how many tokens after a position the drafter reads at it.
        """
        self._cache, self._lag = cache, lag
        self._kept: dict[int, Snapshot] = {}  # the least recently used first
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_pages(self) -> int:
        return sum(len(each.pages.held) for each in self._kept.values())

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
        """Takes the pages of a slot, whose request is over.

        Args:
            tokens: of its context, as far as the host knows them.
            end: position of the context up to which the slot's cache knows it; [] int
                if the device alone knows.
            later_tokens: [n] int, those that follow ``tokens``, on the device.
        """
        cache = self._cache
        num_evicted = cache.num_evicted[slot]
        pages = cache.detach(slot)
        states = cache.pool.keys, cache.pool.values
        device = pages.order.device
        held = torch.tensor(pages.held, device=device)
        is_finite = torch.stack([x[:, held].isfinite().all() for x in states]).all()
        known = [torch.as_tensor(end, device=device), num_evicted, is_finite]
        parts = [torch.stack([each.to(torch.int64) for each in known])]
        if later_tokens is not None:
            parts.append(later_tokens.to(torch.int64))
        read = _to_host(torch.cat(parts))

        @functools.cache
        def facts() -> Facts:
            found = read()
            ended, evicted, finite = found[:3].tolist()
            later = found[3:].astype(np.int32)
            return Facts(np.append(tokens, later), ended, evicted, bool(finite))

        self._add(Snapshot(scope, pages, origin, facts))

    def keep_rows(
        self,
        scope: Hashable,
        tokens: np.ndarray,
        states: States,
        rows: Tensor,
    ) -> None:
        """Copies what a policy kept of the beginning of a context, if there is room.

        Args:
            tokens: of that beginning.
            rows: [num_layers, num_kv_heads, num_kept] int64, of these.
        """
        num_pages = -(-rows.shape[2] // self._cache.page_size)
        if not self.make_room(num_pages):
            return
        pages = self._cache.fill_pages(num_pages, *states, rows, len(tokens))
        num_evicted = len(tokens) - rows.shape[2]
        facts = Facts(tokens, len(tokens), num_evicted, True)
        self._add(Snapshot(scope, pages, 0, lambda: facts))

    def _add(self, snapshot: Snapshot) -> None:
        self._kept[id(snapshot)] = snapshot

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
            if snapshot.scope != scope:
                continue
            facts = snapshot.facts()
            if not facts.is_finite:
                self._drop(snapshot)
                continue
            limits = [_common(facts.tokens, tokens) - self._lag, facts.end]
            if num_computed is not None:
                limits.append(num_computed)
            end = min(limits)
            whole_from = snapshot.pages.whole_from(
                facts.num_evicted, facts.end - snapshot.origin
            )
            num_known = end - snapshot.origin
            num_held = num_known - facts.num_evicted
            if num_known < max(whole_from, 1) or num_held < 1:
                continue
            if best is None or end > best.spared:
                seen = end if num_computed is None else num_computed
                best = Match(
                    snapshot, seen - snapshot.origin, num_held, end, whole_from
                )
        return best

    def take(self, slot: int, match: Match, capacity: int, protected: int) -> bool:
        """Begins a slot with what a snapshot holds, if there are pages.

        With the snapshot's own, if there are not enough for a copy.
        """
        snapshot, cache = match.snapshot, self._cache
        num_pages = capacity // cache.page_size
        del self._kept[id(snapshot)]  # so that it makes no room
        if self.num_pages + cache.pool.num_free >= num_pages:
            self.make_room(num_pages)
            cache.start_request(slot, capacity, protected)
            cache.copy_pages(slot, snapshot.pages)
            self._add(snapshot)
        elif len(snapshot.pages.held) == num_pages:
            cache.start_request(slot, capacity, protected, snapshot.pages)
        else:
            self._add(snapshot)
            return False
        # What lies between what is known and where reading goes on counts as evicted.
        has_gap = match.spared - snapshot.origin < match.num_seen
        cache.begin_with(
            slot,
            match.num_seen if has_gap else match.whole_from,
            match.num_seen,
            match.num_held,
        )
        return True

    def make_room(self, num_pages: int) -> bool:
        """Drops snapshots until so many pages are free; whether they are then."""
        pool = self._cache.pool
        while pool.num_free < num_pages and self._kept:
            self._drop(next(iter(self._kept.values())))
            self.num_evicted += 1
        return pool.num_free >= num_pages

    def forget_all(self) -> None:
        for snapshot in list(self._kept.values()):
            self._drop(snapshot)

    def _drop(self, snapshot: Snapshot) -> None:
        del self._kept[id(snapshot)]
        self._cache.give_back(snapshot.pages)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two contexts begin with alike."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


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
        return copied.numpy()

    return read
