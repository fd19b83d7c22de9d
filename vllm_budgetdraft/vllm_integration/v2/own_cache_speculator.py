"""The speculator of model runner V2 for a drafter with a cache of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.picking import Drafts
from vllm_budgetdraft.vllm_integration.core_loader import load_core
from vllm_budgetdraft.vllm_integration.metrics.observation import (
    CoreObserver,
)
from vllm_budgetdraft.vllm_integration.remembering import (
    remember,
    start_reading,
)
from vllm_budgetdraft.vllm_integration.step_timing import Core
from vllm_budgetdraft.vllm_integration.v2.progress import Progress, rows_of
from vllm_budgetdraft.vllm_integration.v2.speculator import Speculator


class OwnCacheSpeculator(Speculator):
    """Drafts by a ``DraftProposer``, whose slots are the indices of the runner.

    Nothing waits for the device (but see ``_begin_anew``).
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: Any
    ) -> None:
        super().__init__(vllm_config, device, req_states)
        self._core: DraftProposer
        # Of each cache's position 0, where in its context that is.
        self._first_known = [0] * vllm_config.scheduler_config.max_num_seqs

    def _load_core(
        self, target_model: nn.Module, embedding: Tensor | None
    ) -> DrawnLogits | None:
        """Loads what drafts; returns where that tells what drafts are drawn from."""
        self._core = load_core(
            self.vllm_config, target_model, tells_logits=True, embedding=embedding
        )
        self._observer = CoreObserver(self._core, self._statistics)
        num_slots, device = self._core.cache.num_slots, self.device
        self._num_cached = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._offsets = torch.arange(self._core.max_append, device=device)
        return self._core.drawn_logits

    def _begin(self, index: int, progress: Progress, request: Any) -> None:
        """Begins to draft for a request that is to have drafts."""
        tokens = request.prefill_token_ids
        progress.remembered = remember(
            self._core, request, progress.kv_budget, tokens, len(tokens)
        )
        self._start_reading(index, progress, request.num_computed_tokens)

    def _start_reading(self, index: int, progress: Progress, num_computed: int) -> None:
        """Gives a request its pages, and what a snapshot knows of its context."""
        start_reading(
            self._core,
            self._statistics,
            index,
            progress.num_to_read,
            kv_budget=progress.kv_budget,
            num_computed=num_computed,
            remembered=progress.remembered,
        )

    def _ready(self, batch: Any, length: int) -> list[int]:
        """Rows that draft now: they sampled, and their caches have caught up."""
        held = [
            (row, index, progress, progress.step(num_prefilled, num_drafts))
            for row, (index, num_prefilled, num_drafts) in enumerate(rows_of(batch))
            if (progress := self._progress.get(index))
        ]
        for _, index, progress, has_sampled in held:
            if progress.waits:
                try:
                    self._begin_anew(index, progress, has_sampled)
                except Exception as error:
                    self._drop(index, progress, error)
        if reading := [index for _, index, each, _ in held if each.is_reading]:
            self._read(reading)
        self._to_feed = self._core.step_tokens  # of all requests
        rows = []
        for row, index, progress, has_sampled in held:
            if not has_sampled:
                continue
            is_ready = False
            if not progress.why_not:
                try:
                    is_ready = self._is_ready(index, progress, length)
                except Exception as error:
                    self._drop(index, progress, error)
            if length:
                self._statistics.count_wait(progress, is_ready)
            if is_ready:
                rows.append(row)
            else:
                reason = progress.why_not or ("reading" if length else "draft_length")
                self._statistics.count("drafts_skipped", label=reason)
        return rows

    def _draft(
        self,
        slots: Tensor,
        length: int,
        temperatures: Tensor | None,
        top_k: Tensor | None,
    ) -> Drafts:
        """Drafts of slots [B] that are ready to."""
        tokens, ends = self._context_ends(slots)
        return self._core.draft(slots, tokens, ends, length, temperatures, top_k)

    def _end(self, index: int, progress: Progress) -> None:
        """Releases a request, of which a snapshot is kept if there is one to keep.

        Its row of the runner's states must still be its own.
        """
        core, states = self._core, self._states
        is_held = core.cache.is_held(index) and progress.is_read
        remembered = progress.remembered
        if (
            core.snapshots is None
            or remembered is None
            or not is_held
            or remembered.generation != core.snapshots.generation
        ):
            self._release(index)
            return
        known = len(remembered.tokens)
        # All that it can have written by now.
        end = int(states.num_computed_tokens_np[index]) + core.max_drafts + 2
        try:
            core.snapshots.keep(
                index,
                remembered.scope,
                remembered.tokens,
                self._end_of_cache(index, progress),
                origin=self._first_known[index],
                later_tokens=states.all_token_ids.gpu[index, known:end],
            )
            del self._progress[index]
        except Exception as error:
            self._faults.report(f"a snapshot of request {progress.request_id}", error)
            self._release(index)

    def _end_of_cache(self, index: int, progress: Progress) -> Tensor:
        """Position after the last that a request's cache knows, [] int."""
        if progress.has_drafted:
            return self._states.total_len.gpu[index]
        return self._num_cached[index]

    def _release(self, index: int) -> None:
        self._progress.pop(index, None)
        if self._core.cache.is_held(index):
            # Whatever made it fail, which only the device knows, must not outlive it.
            self._core.cache.scrub(index)
            self._core.release_request(index)

    def _reset(self, error: Exception) -> None:
        """Has every request begin anew after a failure of none in particular.

        After several in a row they draft no more, see ``FaultLog.report_every``.
        """
        give_up = self._faults.report_every(error)
        self._core.release_all()
        for progress in self._progress.values():
            if progress.waits or not progress.why_not:
                progress.why_not = "failed"
                progress.waits = not give_up

    def _observe(self) -> None:
        self._observer.observe()

    @property
    def _timed_core(self) -> Core:
        return self._core

    def _begin_anew(self, index: int, progress: Progress, has_sampled: bool) -> None:
        """Gives a request that waits its pages, if there are enough."""
        if not self._core.has_room(progress.kv_budget):
            progress.why_not = "no_pages"
            return
        # The host waits for the device here, once for a request that waited itself.
        num_tokens = int(self._states.total_len.gpu[index])
        progress.begin(num_tokens, has_sampled=has_sampled)
        self._start_reading(index, progress, progress.num_to_read)

    def _is_ready(self, index: int, progress: Progress, length: int) -> bool:
        """Whether a request that sampled is to draft now."""
        had_drafted, progress.has_drafted = progress.has_drafted, False
        if had_drafted:
            progress.max_missing = 0
        if progress.is_read and length:
            if progress.max_missing > 0:
                self._catch_up(index, progress)
            progress.has_drafted = progress.max_missing <= 0
        if had_drafted and not progress.has_drafted:
            end = self._states.total_len.gpu[index]
            self._num_cached[index] = end - FIRST_WIDTH
        return progress.has_drafted

    def _read(self, indices: list[int]) -> None:
        """Reads on in prompts, as far as this step may."""

        def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
            ids = self._states.all_token_ids.gpu
            parts = [ids[index, piece.start : piece.stop] for index, piece in pieces]
            return torch.cat(parts).to(torch.int64)

        failed = self._core.read(indices, tokens_of, self._core.step_tokens)
        for index in indices:
            progress = self._progress[index]
            if error := failed.get(index):
                self._drop(index, progress, error)
            elif not self._core.reader.is_reading(index):
                self._num_cached[index] = progress.num_to_read
                progress.is_read = True

    def _catch_up(self, index: int, progress: Progress) -> None:
        """Feeds tokens that came without drafts, as far as this step may.

        Beyond the context's end it feeds what nobody will read.
        """
        states, cached = self._states, self._num_cached[index : index + 1]
        while progress.max_missing > 0 and self._to_feed > 0:
            width = min(progress.max_missing, self._core.max_append)
            positions = cached[:, None] + self._offsets[:width]
            positions = positions.clamp_(max=self._max_model_len - 1)
            tokens = states.all_token_ids.gpu[index, positions].to(torch.int64)
            slots = torch.full_like(cached, index)
            self._core.append(slots, tokens, cached.clone())
            end = states.total_len.gpu[index] - FIRST_WIDTH
            cached.add_(width).clamp_(max=end)
            progress.max_missing -= width
            self._to_feed -= width

    def _context_ends(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The last tokens [B, FIRST_WIDTH] of contexts, and their lengths [B]."""
        states = self._states
        ends = states.total_len.gpu[slots].to(torch.int64)
        last = ends[:, None] + self._offsets[:FIRST_WIDTH] - FIRST_WIDTH
        return states.all_token_ids.gpu[slots[:, None], last].to(torch.int64), ends
