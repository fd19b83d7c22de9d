"""The proposer of model runner V1: lists and request ids to slots and tensors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_budgetdraft import environment
from vllm_budgetdraft.config import parse_request_settings
from vllm_budgetdraft.errors import PagePoolExhaustedError
from vllm_budgetdraft.proposer.draft_proposer import FIRST_WIDTH, DraftProposer
from vllm_budgetdraft.proposer.memory import MemoryPlan, resolve_dtype
from vllm_budgetdraft.vllm_integration import metrics
from vllm_budgetdraft.vllm_integration.faults import FaultLog, logger
from vllm_budgetdraft.vllm_integration.patches import runner_v1
from vllm_budgetdraft.vllm_integration.request_slots import Holding, RequestSlots

#: In the place of a draft token whose logits were not finite.
NOT_FINITE = -1


class BudgetDraftProposer:
    """vLLM's "custom_class" contract over a ``DraftProposer``.

    It has no attribute ``model``: the runner takes that for a vLLM module.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config.speculative_config.settings
        self._num_slots = vllm_config.scheduler_config.max_num_seqs
        self._max_model_len = vllm_config.model_config.max_model_len
        self._target_dtype = vllm_config.model_config.dtype
        self._slots = RequestSlots(self._num_slots)
        self._core: DraftProposer
        self._runner: Any
        self._reading: Holding | None = None
        self._faults = FaultLog()
        runner_v1.apply(type(self))

    def load_model(self, target: nn.Module) -> None:
        """Allocates everything: only what lives after this does vLLM count as used."""
        device = next(target.parameters()).device
        dtype = resolve_dtype(self._config, device.type, self._target_dtype)
        self._core = DraftProposer.build(
            self._config,
            num_slots=self._num_slots,
            max_model_len=self._max_model_len,
            dtype=dtype,
            device=device,
        )
        self._core.warm_up()
        self._log_memory(dtype)
        self._warn_of_long_contexts()

    def bind(self, runner: Any) -> None:
        """Names the runner whose batch the next ``propose`` is about."""
        self._runner = runner

    def profile_run(self) -> None:
        self._core.warm_up()

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for every row that has just sampled.

        Args:
            sampled_token_ids: by row; empty while a prompt is still being prefilled.
            num_tokens_no_spec: [max_num_reqs], context lengths with what was sampled.
            token_ids_cpu: [max_num_reqs, max_model_len], the contexts.

        Returns:
            0 to k tokens by row; none for a row whose drafting fails: the target goes
            on alone.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        # The target samples one more token after the last draft that it accepts.
        room = self._max_model_len - 1 - num_tokens_no_spec
        try:
            requests = self._requests(
                [
                    (row, token_ids_cpu[row, : num_tokens_no_spec[row]], bool(sampled))
                    for row, sampled in enumerate(sampled_token_ids)
                    if room[row] > 0
                ]
            )
            for row, drafted in self._draft(requests).items():
                drafts[row] = drafted[: room[row]]
        except Exception as error:
            # Of no request in particular, so that no cache is known to be good.
            self._faults.report("every request", error)
            self._core.release_all()
            self._slots = RequestSlots(self._num_slots)
            self._reading = None
            drafts = [[] for _ in sampled_token_ids]
        pool = self._core.cache.pool
        metrics.PAGES_IN_USE.set(pool.num_pages - pool.num_free)
        return drafts

    def _requests(self, rows: list[tuple[int, np.ndarray, bool]]) -> list["_Request"]:
        """Those of some rows, contexts, and whether they sampled, that may draft.

        What ended since the last step is forgotten.
        """
        live = self._runner.requests
        for request_id in self._slots.ended(live):
            self._release(request_id)
        self._slots.forget_ended(live)
        ids = self._runner.input_batch.req_ids
        requests = [
            _Request(row, ids[row], live[ids[row]], context, sampled)
            for row, context, sampled in rows
        ]
        given_up = self._slots.has_given_up
        return [
            r
            for r in requests
            # A prompt of embeddings has no ids; its row holds those of another request.
            if r.state.prompt_embeds is None and not given_up(r.request_id, r.state)
        ]

    def _draft(self, requests: list["_Request"]) -> dict[int, list[int]]:
        """Drafts by row, of the rows that have caught up and do not fail."""
        holdings = [self._holding(request) for request in requests]
        if self._reading and not any(held is self._reading for held in holdings):
            # Its request waits, and others may read: there is one buffer for prompts.
            self._reading = None
        batch = {request.request_id for request in requests}
        ready = []
        unread = self._core.config.draft_prefill_chunk  # that may be read in this step
        if half_read := self._reading:  # goes first, for the buffer is taken
            requests.sort(key=lambda request: self._holding(request) is not half_read)
        for request in requests:
            try:
                holding = self._up_to_date(request, batch)
                if holding is None:
                    continue
                if not holding.is_read:
                    unread -= self._read(request, holding, unread)
                if holding.is_read and request.sampled:
                    ready.append((request, holding))
            except Exception as error:
                self._drop(request, error)
        return self._draft_ready(ready)

    def _holding(self, request: "_Request") -> Holding | None:
        return self._slots.get(request.request_id, request.state)

    def _up_to_date(self, request: "_Request", batch: set[str]) -> Holding | None:
        """A slot with pages, whose cache if it is read belongs to the context.

        Returns:
            None for a request that asked for no drafts.
        """
        holding = self._holding(request)
        if holding is not None and holding.is_read:
            if holding.continues(request.context, request.sampled):
                if environment.check_invariants():
                    self._core.cache.check_slot(holding.slot)
                return holding
            self._release(request.request_id)
            holding = None
        return holding or self._start(request, batch)

    def _start(self, request: "_Request", batch: set[str]) -> Holding | None:
        """A slot with pages; if there is none, of requests outside the batch.

        Raises:
            PagePoolExhaustedError: too few pages are free even so.
        """
        params = request.state.sampling_params
        settings = parse_request_settings(params and params.extra_args, self._config)
        if settings.num_speculative_tokens == 0:
            return None
        idle = self._slots.idle(batch)
        while idle and not (
            self._slots.num_free and self._core.has_room(settings.kv_budget)
        ):
            self._release(idle.pop(0))
        holding = self._slots.take(request.request_id, request.state, settings)
        try:
            self._core.start_request(holding.slot, settings.kv_budget)
        except PagePoolExhaustedError:
            self._slots.release(request.request_id)
            raise
        return holding

    def _read(self, request: "_Request", holding: Holding, limit: int) -> int:
        """Reads up to ``limit`` more tokens of a context; returns how many.

        A row that has not sampled yet will have one more token when it drafts.
        """
        if limit <= 0 or (self._reading is not None and self._reading is not holding):
            return 0
        core, context = self._core, request.context
        end = len(context) - (FIRST_WIDTH if request.sampled else FIRST_WIDTH - 1)
        if self._reading is None:
            core.start_reading(end, holding.settings.kv_budget)
            self._reading = holding
        num_read = 0
        while unread := core.unread(end)[: limit - num_read]:
            tokens = context[unread.start : unread.stop].astype(np.int64)
            core.read(torch.from_numpy(tokens).to(core.device))
            num_read += len(unread)
        if not core.unread(end):
            core.finish_reading(holding.slot)
            self._reading, holding.is_read = None, True
            holding.num_tokens = len(context)
        return num_read

    def _draft_ready(
        self, ready: list[tuple["_Request", Holding]]
    ) -> dict[int, list[int]]:
        if not ready:
            return {}
        try:
            drafts = self._core_drafts(ready)
        except Exception as error:
            if len(ready) == 1:
                self._drop(ready[0][0], error)
                return {}
            # One of them may be at fault: each by itself.
            alone = [self._draft_ready([each]) for each in ready]
            return {row: drafted for each in alone for row, drafted in each.items()}
        sound = {}
        for (request, holding), drafted in zip(ready, drafts, strict=True):
            if NOT_FINITE in drafted:
                self._drop(request, FloatingPointError("logits are not finite"))
                continue
            holding.num_tokens, holding.drafts = len(request.context), drafted
            sound[request.row] = drafted[: holding.settings.num_speculative_tokens]
        return sound

    def _core_drafts(self, ready: list[tuple["_Request", Holding]]) -> list[list[int]]:
        """k tokens of each, ``NOT_FINITE`` where the logits were not."""
        contexts = [request.context for request, _ in ready]
        device = self._core.device
        tokens = torch.from_numpy(np.stack([c[-FIRST_WIDTH:] for c in contexts]))
        drafts, confidences = self._core.draft(
            torch.tensor([holding.slot for _, holding in ready], device=device),
            tokens.to(device, torch.int64),
            torch.tensor([len(context) for context in contexts], device=device),
        )
        return drafts.masked_fill(~confidences.isfinite(), NOT_FINITE).tolist()

    def _drop(self, request: "_Request", error: Exception) -> None:
        """Ends the drafting of a request; for now only, if it waits for pages."""
        if holding := self._holding(request):
            self._core.cache.scrub(holding.slot)
            self._release(request.request_id)
        if not isinstance(error, PagePoolExhaustedError):
            self._slots.give_up(request.request_id, request.state)
        self._faults.report(f"request {request.request_id}", error)

    def _release(self, request_id: str) -> None:
        if self._slots.holds(request_id, self._reading):
            self._reading = None
        self._core.release_request(self._slots.release(request_id))

    def _log_memory(self, dtype: torch.dtype) -> None:
        core, mib = self._core, 2**20
        plan = MemoryPlan.of(
            core.config,
            core.drafter.config,
            num_slots=self._num_slots,
            max_model_len=self._max_model_len,
            dtype=dtype,
        )
        weights = sum(p.nbytes for p in core.drafter.parameters())
        logger.info(
            "BudgetDraft memory: drafter weights %.1f MiB, draft cache %.1f MiB "
            "(%d requests x %d tokens, %.1f KiB each; the drafter's full cache would "
            "take %.1f KiB each), scratch %.1f MiB",
            weights / mib,
            plan.cache / mib,
            plan.cache // plan.cache_per_request,
            core.cache.capacity,
            plan.cache_per_request / 1024,
            plan.full_cache_per_request / 1024,
            core.scratch_bytes / mib,
        )

    def _warn_of_long_contexts(self) -> None:
        native = self._core.drafter.config.max_position_embeddings
        is_absolute = self._core.config.position_mode == "absolute"
        if is_absolute and self._max_model_len > native:
            logger.warning(
                "max_model_len=%d is beyond the %d tokens that the drafter was made "
                "for (max_position_embeddings): drafts there may be poor; "
                "position_mode='cache_relative' keeps its positions below",
                self._max_model_len,
                native,
            )


@dataclass(frozen=True)
class _Request:
    """A row of the batch that is to be drafted for.

    Attributes:
        state: vLLM's object for the request.
        context: token ids, prompt and output.
        sampled: whether it sampled a token in this step; if not, its prompt is still
            being prefilled.
    """

    row: int
    request_id: str
    state: Any
    context: np.ndarray
    sampled: bool
