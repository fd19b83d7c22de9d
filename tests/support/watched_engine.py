"""An engine that knows what its drafter has to do, and compares."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, takewhile
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.adapter import Engine, Request
from tests.support.list_twin import ListTwin
from vllm_budgetdraft.config import RequestSettings
from vllm_budgetdraft.errors import PagePoolExhaustedError
from vllm_budgetdraft.proposer.reading import Begun, Mark


class WatchedEngine(Engine):
    """Checks every proposal against twins of what the drafter reads and drafts.

    Attributes:
        twins: of the requests whose context has been read.
        half_read: of the requests whose context is being read, the oldest first.
        failed: requests that draft no more, for their policy fails on purpose.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        # float64, so that rounding decides between no two tokens or positions.
        super().__init__(folder, dtype=torch.float64, **settings)
        core, drafter = self.core, self.proposer._drafting
        for owner, name, watcher in (
            (core.reader, "start", self._start_reading),
            (core.reader, "restart", self._restart),
            (core.reader, "_pass", self._pass),
            (core.reader, "_finish", self._finish),
            (core, "append", self._append),
            (core, "draft", self._draft),
            (drafter, "_start", self._start),
            (drafter, "_release", self._release),
        ):
            setattr(owner, name, partial(watcher, getattr(owner, name)))
        drafter._faults.report = self._report
        self.twins: dict[str, ListTwin] = {}
        self.failed: dict[str, Request] = {}
        self.half_read: dict[str, ListTwin] = {}
        self._starter = ""

    @torch.inference_mode()
    def propose(self) -> dict[str, list[int]]:
        self._num_read = self._num_appended = 0
        self._lost = set[str]()
        self._given: dict[str, list[int]] = {}
        self._wrong: dict[str, str] = {}
        self._errors: dict[str, Exception] = {}
        drafts = super().propose()
        for name, error in self._errors.items():
            if "on purpose" in str(error):
                assert self.failed.get(name) is not self.requests[name], name
                self.failed[name] = self.requests[name]
            elif not isinstance(error, PagePoolExhaustedError):
                raise error
        assert not self._wrong, self._wrong
        assert self._lost <= self._errors.keys(), self._lost
        self._check_slots()
        for name, drafted in drafts.items():
            assert drafted == self._due(name), (name, drafted)
            if self.longest and name in self.twins:
                self.twins[name].num_known = len(self.tokens[name])
        return drafts

    def check_pages(self) -> None:
        """Pages in use are those that the requests must hold, each by its budget."""
        cache, held = self.core.cache, self.proposer._drafting._slots._held
        cache.check_invariants()
        assert len({holding.slot for holding in held.values()}) == len(held)
        needed = sum(self._num_pages(name) for name in held)
        assert cache.pool.num_pages - cache.pool.num_free == needed, held

    def _check_slots(self) -> None:
        """Whoever may draft does, or waits for room or for its turn to read."""
        self.check_pages()
        held, limit = self.proposer._drafting._slots._held, self.core.step_tokens
        for name, holding in held.items():
            assert holding.state is self.requests.get(name), name
            assert self._is_drafted_for(name), name
        assert {*self.twins, *self.half_read} == held.keys()
        # What fails together is read again, by itself.
        assert self._num_read <= limit or self._errors
        if self.longest == 0:
            assert not (self._num_read or self._num_appended or self._given)
            return
        assert self._num_appended < limit + len(self.batch) * self.core.max_append
        running = self._running
        for name in running:
            if name not in held:
                assert isinstance(self._errors[name], PagePoolExhaustedError), name
                # Nobody holds pages idly, and what is free now is too little, unless
                # another one has failed since.
                assert held.keys() <= running, (name, held.keys())
                num_free = self.core.cache.pool.num_free
                has_failed = self._errors.keys() & self.failed.keys()
                assert num_free < self._num_pages(name) or has_failed, name
            elif name not in self.twins and not self._errors:
                assert self._num_read == limit or not self._has_room(name), name

    @property
    def _running(self) -> set[str]:
        """Requests of the batch that may draft."""
        names = {name for name in self.batch if self._room(name) > 0}
        return set(filter(self._is_drafted_for, names))

    @property
    def longest(self) -> int:
        """Most drafts of this batch, by the schedule."""
        config = self.core.config
        lengths = [
            length
            for first, _, length in config.num_speculative_tokens_per_batch_size or []
            if first <= len(self.batch)
        ]
        return min([config.num_speculative_tokens, *lengths[-1:]])

    def _due(self, name: str) -> list[int]:
        """What a request of the batch must be given."""
        can_draft = name in self.twins and name not in self.prefilling
        if not can_draft or self._most_drafts(name) <= 0:
            return []
        if name not in self._given:  # it could not catch up in one step
            assert self._num_appended >= self.core.step_tokens, name
            return []
        return self._given[name]

    def _most_drafts(self, name: str) -> int:
        asked = self._asked(name).num_speculative_tokens
        most = min(self.longest, self._room(name))
        return most if asked is None else min(most, asked)

    def _asked(self, name: str) -> RequestSettings:
        return RequestSettings(**self.requests[name].sampling_params.extra_args)

    def _is_drafted_for(self, name: str) -> bool:
        request = self.requests[name]
        has_failed = self.failed.get(name) is request
        asks_for_none = self._asked(name).num_speculative_tokens == 0
        return request.prompt_embeds is None and not has_failed and not asks_for_none

    def _num_pages(self, name: str) -> int:
        config, budget = self.core.config, self._asked(name).kv_budget
        return config.cache_capacity(self.max_model_len, budget) // config.page_size

    def _room(self, name: str) -> int:
        """Tokens that may follow the context, less the target's last."""
        return self.max_model_len - 1 - len(self.tokens[name])

    def _num_readable(self, name: str) -> int:
        """Drafting feeds the last two tokens; there will be another one by then."""
        return len(self.tokens[name]) - (1 if name in self.prefilling else 2)

    def _has_room(self, name: str) -> bool:
        """Whether the buffer takes a prompt beside those before it."""
        twins = [self.half_read[each] for each in self.half_read if each in self.batch]
        twins.sort(key=lambda twin: twin.num_seen == 0)  # the others hold theirs
        ahead = twins[: twins.index(self.half_read[name]) + 1]
        needed = sum(twin.most_held for twin in ahead)
        return needed <= self.core.reader.prompt.max_tokens

    def _name_of(self, slot: int) -> str:
        held = self.proposer._drafting._slots._held
        return next(name for name in held if held[name].slot == slot)

    def _start(self, original: Callable, request: Any, *rest: Any) -> Any:
        self._starter = request.request_id
        return original(request, *rest)

    def _start_reading(
        self,
        original: Callable,
        slot: int,
        num_tokens: int,
        budget: int | None,
        begun: Begun,
        mark: Mark | None,
    ) -> None:
        original(slot, num_tokens, budget, begun, mark)
        assert not begun.num_held and mark is None  # its requests are of no scope
        name = self._name_of(slot)
        assert num_tokens == self._num_readable(name), name
        self.half_read[name] = ListTwin(
            self.core, self._asked(name).kv_budget, num_tokens
        )

    def _restart(self, original: Callable, slot: int) -> int:
        num_seen: int = original(slot)
        name = self._name_of(slot)
        twin, budget = self.half_read[name], self._asked(name).kv_budget
        self.half_read[name] = ListTwin(self.core, budget, twin.num_tokens)
        return num_seen

    def _pass(
        self, original: Callable, pieces: list, tokens: Tensor, features: None
    ) -> None:
        self._num_read += len(tokens)
        given = iter(tokens.tolist())
        for reading, piece in pieces:
            context = self.tokens[self._name_of(reading.slot)]
            assert [next(given) for _ in piece] == context[piece.start : piece.stop]
        original(pieces, tokens, features)
        for reading, piece in pieces:
            name = self._name_of(reading.slot)
            self.half_read[name].read(self.tokens[name], len(piece))

    def _finish(self, original: Callable, readings: list) -> None:
        names = [self._name_of(reading.slot) for reading in readings]
        original(readings)
        for name in names:
            twin = self.half_read.pop(name)
            assert twin.num_seen == twin.num_tokens, name
            twin.finish(self.tokens[name])
            self.twins[name] = twin

    def _append(
        self, original: Callable, slots: Tensor, tokens: Tensor, starts: Tensor
    ) -> None:
        original(slots, tokens, starts)
        self._num_appended += tokens.numel()
        width = tokens.shape[1]
        for slot, start in zip(slots.tolist(), starts.tolist(), strict=True):
            name = self._name_of(slot)
            assert start + width <= self._num_readable(name), name
            if not self.twins[name].append(self.tokens[name], start, width):
                self._wrong[name] = f"{width} tokens appended at {start}"

    def _draft(self, original: Callable, slots: Tensor, *rest: Any) -> Any:
        result = original(slots, *rest)
        names = [self._name_of(slot) for slot in slots.tolist()]
        assert result.tokens.shape[1] == max(map(self._most_drafts, names)), names
        rows = zip(
            names,
            slots.tolist(),
            result.tokens.tolist(),
            result.confidences.tolist(),
            strict=True,
        )
        for name, slot, drafts, confidences in rows:
            num_given = min(self._most_drafts(name), self._num_sure(confidences))
            self._given[name] = drafts[:num_given]
            twin = self.twins.get(name)
            if not (twin and twin.agrees(self.tokens[name], drafts, num_given)):
                self._wrong[name] = f"drafts {drafts}"
            elif self.core.policy.accumulates_attention:
                received = self.core.cache.received[slot, : len(twin.by_page)]
                if not received.double().allclose(twin.by_page, atol=1e-3):
                    self._wrong[name] = "attention of its pages"
        return result

    def _num_sure(self, confidences: list[float]) -> int:
        products = accumulate(confidences, mul)
        threshold = self.core.config.draft_confidence_threshold
        return sum(takewhile(bool, (product >= threshold for product in products)))

    def _release(self, original: Callable, name: str) -> None:
        """Pages are taken from nobody who still needs them."""
        slots, running = self.proposer._drafting._slots, self._running
        twin = self.twins.pop(name, None)
        self.half_read.pop(name, None)
        is_over = slots.get(name, self.requests.get(name)) is None
        if not is_over and name not in running:
            num_free = self.core.cache.pool.num_free
            has_room = num_free >= self._num_pages(self._starter)
            assert not slots.num_free or not has_room, name
            assert name == next(held for held in slots._held if held not in running)
        elif not is_over:
            samples = name not in self.prefilling
            if twin is None or twin.goes_on(self.tokens[name], samples):
                self._lost.add(name)
        original(name)

    def _report(self, whose: str, error: Exception) -> None:
        self._errors[whose.removeprefix("request ")] = error
