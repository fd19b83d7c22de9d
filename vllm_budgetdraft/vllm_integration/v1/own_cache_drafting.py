"""Requests of a batch to drafts: who reads, who drafts, and whose drafting ends."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_budgetdraft import environment
from vllm_budgetdraft.config import parse_request_settings
from vllm_budgetdraft.errors import PagePoolExhaustedError
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.warm_up import warm_up
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.metrics.observation import (
    CoreObserver,
    DraftTimer,
)
from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics
from vllm_budgetdraft.vllm_integration.remembering import (
    Remembered,
    remember,
    start_reading,
    written_by,
)
from vllm_budgetdraft.vllm_integration.sampling import (
    DraftSampling,
    as_tensors,
    draft_sampling,
)
from vllm_budgetdraft.vllm_integration.v1.draft_lists import (
    NOT_FINITE,
    confident,
    marked,
)
from vllm_budgetdraft.vllm_integration.v1.drafting import Request, max_drafts
from vllm_budgetdraft.vllm_integration.v1.request_slots import Holding, RequestSlots


class OwnCacheDrafting:
    """``Drafting`` for requests that hold slots of a ``DraftProposer``."""

    def __init__(self, core: DraftProposer, num_slots: int) -> None:
        self._core = core
        self._slots = RequestSlots(num_slots)
        self._batch: list[Request] = []
        self.statistics = DraftStatistics()
        self._faults = FaultLog(self.statistics)
        self._observer = CoreObserver(core, self.statistics)
        self.timer = DraftTimer(core.device)
        self.probabilities: tuple[list[str], Tensor] | None = None
        self.has_only_drafted = False

    def observe(self) -> None:
        """Notes what the draft cache holds now, and what drafting took."""
        self._observer.observe()
        self.statistics.count("draft_seconds", self.timer.take())

    def warm_up(self) -> None:
        warm_up(self._core)

    def reset(self, error: Exception) -> None:
        """See ``Drafting``."""
        give_up = self._faults.report_every(error)
        self._core.release_all()
        self._slots.release_all()
        for request in self._batch if give_up else []:
            self._slots.give_up(request.request_id, request.state, "failed")
        self.probabilities = None

    def forget_ended(self, live: Mapping[str, Any]) -> None:
        """See ``Drafting``; what they leave may be kept for others."""
        for request_id in self._slots.ended(live):
            self._end(request_id)
        self._slots.forget_ended(live)

    def draft(
        self, requests: list[Request], is_trial: bool = False
    ) -> dict[int, list[int]]:
        """Drafts by row, of the rows that have caught up and do not fail.

        Args:
            is_trial: whether it will do if some draft: nobody else reads then.
        """
        self.probabilities = None
        self._batch = requests
        batch = {request.request_id for request in requests}
        drafting = [request for request in requests if request.max_drafts]
        able = self._able(drafting, batch)
        unread = [each for each in able if not each[1].is_read]
        if unread and (not is_trial or len(unread) == len(able)):
            self._read(unread)
        ready = [each for each in able if each[1].is_read and each[0].sampled]
        is_behind = any(_num_missing(*each) for each in ready)
        drafts = self._draft_ready(ready, self._core.step_tokens)
        if drafts:
            self._faults.drafted()
        only_drafted = not unread and not is_behind
        only_drafted &= len(drafting) == len(requests)
        self.has_only_drafted = only_drafted and len(drafts) == len(able)
        self._count(requests, drafts)
        return drafts

    def _able(
        self, requests: list[Request], batch: set[str]
    ) -> list[tuple[Request, Holding]]:
        """Requests that may draft, each with a slot that belongs to its context.

        Args:
            batch: ids of all of them, and of others that keep their slots.
        """
        able = []
        for request in requests:
            if self._slots.why_given_up(request.request_id, request.state):
                continue
            try:
                holding = self._up_to_date(request, batch)
            except Exception as error:
                self._drop(request, error)
                continue
            if holding is None:
                self._slots.give_up(request.request_id, request.state, "off")
            else:
                able.append((request, holding))
        return able

    def _count(self, requests: list[Request], drafts: dict[int, list[int]]) -> None:
        for request in requests:
            if not request.sampled:
                continue
            if not drafts.get(request.row):
                self.statistics.count("drafts_skipped", label=self._why_not(request))
            if holding := self._holding(request):
                self.statistics.count_wait(holding, bool(drafts.get(request.row)))

    def _why_not(self, request: Request) -> str:
        """Why a request that sampled has no drafts."""
        if reason := self._slots.why_given_up(request.request_id, request.state):
            return reason
        if not request.max_drafts:
            return "draft_length"
        if (holding := self._holding(request)) is None:
            return "no_pages"
        is_behind = not holding.is_read or _num_missing(request, holding)
        return "reading" if is_behind else "not_confident"

    def _holding(self, request: Request) -> Holding | None:
        return self._slots.get(request.request_id, request.state)

    def _up_to_date(self, request: Request, batch: set[str]) -> Holding | None:
        """A slot with pages; what it has read belongs to the context.

        Returns:
            None for a request that asked for no drafts.
        """
        holding = self._holding(request)
        if holding is not None and not holding.is_read:
            if holding.num_cached <= _num_readable(request):
                return holding
        elif holding is not None:
            if holding.goes_on(request.context, request.sampled):
                if environment.check_invariants():
                    self._core.cache.check_slot(holding.slot)
                return holding
        if holding is not None:  # the context was rolled back
            self._release(request.request_id)
        return self._start(request, batch)

    def _start(self, request: Request, batch: set[str]) -> Holding | None:
        """A slot with pages; if there is none, of requests outside the batch.

        Raises:
            PagePoolExhaustedError: too few pages are free even so.
        """
        params, config = request.state.sampling_params, self._core.config
        settings = parse_request_settings(params and params.extra_args, config)
        if settings.num_speculative_tokens == 0:
            return None
        idle = self._slots.idle(batch)
        while idle and not (
            self._slots.num_free and self._core.has_room(settings.kv_budget)
        ):
            self._end(idle.pop(0))
        sampling = DraftSampling()
        if config.draft_sample_method == "probabilistic":
            sampling = draft_sampling(params)
        holding = self._slots.take(
            request.request_id,
            request.state,
            settings=settings,
            sampling=sampling,
        )
        try:
            self._begin(request, holding)
        except Exception:
            self._slots.release(request.request_id)
            raise
        return holding

    def _begin(self, request: Request, holding: Holding) -> None:
        """Has the context be read, all but what the first draft feeds."""
        holding.num_cached = _num_readable(request)
        start_reading(
            self._core,
            self.statistics,
            holding.slot,
            holding.num_cached,
            kv_budget=holding.settings.kv_budget,
            num_computed=request.num_computed,
            remembered=self._remembered(request, holding),
        )

    def _remembered(self, request: Request, holding: Holding) -> Remembered | None:
        holding.remembered = remember(
            self._core,
            request.state,
            holding.settings.kv_budget,
            request.context,
            request.state.num_prompt_tokens,
        )
        return holding.remembered

    def _end(self, request_id: str) -> None:
        """Releases a request, of which a snapshot is kept if there is one to keep."""
        holding, store = self._slots.holding(request_id), self._core.snapshots
        remembered, state = holding.remembered, holding.state
        if (
            store is None
            or remembered is None
            or not holding.is_read
            or remembered.generation != store.generation
            # A session's prompt grows, by other tokens than it has written.
            or state.num_prompt_tokens != remembered.num_prompt
        ):
            self._release(request_id)
            return
        prompt = remembered.tokens[: remembered.num_prompt]
        try:
            store.keep(
                holding.slot,
                remembered.scope,
                np.append(prompt, written_by(state)),
                holding.num_cached,
                origin=holding.origin,
            )
        except Exception as error:
            self._faults.report(f"a snapshot of request {request_id}", error)
            self._release(request_id)
        else:
            self._slots.release(request_id)

    def _read(self, unread: list[tuple[Request, Holding]]) -> None:
        """Reads on in contexts, as far as this step may."""
        contexts = {holding.slot: request.context for request, holding in unread}

        def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
            parts = [contexts[slot][piece.start : piece.stop] for slot, piece in pieces]
            return self._tensor(np.concatenate(parts))

        failed = self._core.read(contexts, tokens_of, self._core.step_tokens)
        for request, holding in unread:
            if error := failed.get(holding.slot):
                self._drop(request, error)
            elif not self._core.reader.is_reading(holding.slot):
                holding.is_read = True
                holding.num_tokens = len(request.context)

    def _draft_ready(
        self, ready: list[tuple[Request, Holding]], limit: int
    ) -> dict[int, list[int]]:
        """Drafts by row, of requests that together lack at most ``limit`` tokens."""
        try:
            self._append(ready, limit)
            ready = [each for each in ready if not _num_missing(*each)]
            drafts = self._core_drafts(ready) if ready else []
        except Exception as error:
            self.probabilities = None
            if len(ready) == 1:
                self._drop(ready[0][0], error)
                return {}
            # One of them may be at fault: each by itself, and without probabilities,
            # which are not needed for exactness.
            alone = [self._draft_ready([each], limit) for each in ready]
            self.probabilities = None
            return {row: drafted for each in alone for row, drafted in each.items()}
        sound = {}
        for (request, holding), drafted in zip(ready, drafts, strict=True):
            if NOT_FINITE in drafted:
                self._drop(request, FloatingPointError("logits are not finite"))
                continue
            num_fed = len(drafted) - 1  # all but the last
            limit = max_drafts(request, holding.settings)
            drafted = confident(drafted)[:limit]
            holding.drafted(len(request.context), drafted[:num_fed])
            sound[request.row] = drafted
        return sound

    def _append(self, ready: list[tuple[Request, Holding]], limit: int) -> None:
        """Feeds tokens that came without drafts, to as many requests at once as can."""
        while limit > 0:
            groups = defaultdict(list)
            for request, holding in ready:
                if missing := _num_missing(request, holding):
                    width = min(missing, self._core.max_append)
                    groups[width].append((request, holding))
            if not groups:
                return
            for width, group in groups.items():
                starts = [holding.num_cached for _, holding in group]
                tokens = [
                    request.context[start : start + width]
                    for (request, _), start in zip(group, starts, strict=True)
                ]
                self._core.append(
                    self._tensor([holding.slot for _, holding in group]),
                    self._tensor(np.stack(tokens)),
                    self._tensor(starts),
                )
                for _, holding in group:
                    holding.num_cached += width
                limit -= width * len(group)

    def _core_drafts(self, ready: list[tuple[Request, Holding]]) -> list[list[int]]:
        """Tokens of each; ``NOT_FINITE`` or ``NOT_CONFIDENT`` where they are of no use.

        As many for each, though some may propose fewer of them.
        """
        rows = self._tensor(  # at once, for each copy to a GPU makes the host wait
            [
                (held.slot, len(request.context), *request.context[-FIRST_WIDTH:])
                for request, held in ready
            ]
        )
        samplings = [holding.sampling for _, holding in ready]
        temperatures, top_k = as_tensors(samplings, self._core.device)
        tokens, confidences, probabilities = self._core.draft(
            rows[:, 0],
            rows[:, 2:],
            rows[:, 1],
            max(max_drafts(request, held.settings) for request, held in ready),
            temperatures,
            top_k,
        )
        if probabilities is not None:
            ids = [request.request_id for request, _ in ready]
            self.probabilities = ids, probabilities
        threshold = self._core.config.draft_confidence_threshold
        return marked(tokens, confidences, threshold)

    def _tensor(self, data: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(data, dtype=dtype).to(self._core.device)

    def _drop(self, request: Request, error: Exception) -> None:
        """Ends the drafting of a request; for now only, if it waits for pages."""
        if holding := self._holding(request):
            self._core.cache.scrub(holding.slot)
            self._release(request.request_id)
        if not isinstance(error, PagePoolExhaustedError):
            self._slots.give_up(request.request_id, request.state, "failed")
        self._faults.report(f"request {request.request_id}", error)

    def _release(self, request_id: str) -> None:
        slot = self._slots.release(request_id)
        if self._core.cache.is_held(slot):  # not so if keeping it failed half way
            self._core.release_request(slot)


def _num_readable(request: Request) -> int:
    """How many context tokens come before the ones that the next draft feeds.

    A row that has not sampled yet will have one more token when it drafts.
    """
    return len(request.context) - FIRST_WIDTH + (not request.sampled)


def _num_missing(request: Request, holding: Holding) -> int:
    """How many context tokens the cache lacks, without the ones that a draft feeds."""
    return max(0, len(request.context) - FIRST_WIDTH - holding.num_cached)
