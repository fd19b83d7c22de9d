"""The speculator of model runner V2: a ``DraftProposer`` over the runner's tensors."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_budgetdraft.config import parse_request_settings
from vllm_budgetdraft.errors import PagePoolExhaustedError
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.memory import resolve_dtype
from vllm_budgetdraft.proposer.picking import Drafts
from vllm_budgetdraft.proposer.step_costs import StepCosts
from vllm_budgetdraft.vllm_integration.core_loader import embedding_for, load_core
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.metrics.observation import (
    CoreObserver,
    DraftTimer,
)
from vllm_budgetdraft.vllm_integration.metrics.statistics import (
    STEP_COSTS,
    DraftStatistics,
)
from vllm_budgetdraft.vllm_integration.remembering import (
    remember,
    start_reading,
)
from vllm_budgetdraft.vllm_integration.sampling import draft_sampling, is_greedy
from vllm_budgetdraft.vllm_integration.step_timing import Core, time_steps
from vllm_budgetdraft.vllm_integration.v2.draft_output import DraftOutput
from vllm_budgetdraft.vllm_integration.v2.progress import Progress, rows_of
from vllm_budgetdraft.vllm_integration.v2.without_module import SpeculatorWithoutModule


class BudgetDraftSpeculator(SpeculatorWithoutModule):
    """Drafts for the rows of a batch, by the indices that the runner gives requests.

    An index of the runner is a slot of the proposer. Tokens, lengths and drafts stay on
    the device: nothing waits for it (but see ``_begin_anew``), and scheduling may run
    ahead.

    Attributes:
        drafted: ids of the requests that drafted in the last step.
    """

    #: Whether it is to be given what the target thought.
    reads_features = False

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: Any
    ) -> None:
        # Not the base class's, which makes buffers for what is absent here.
        self.vllm_config = vllm_config
        self.device = device
        self._states = req_states
        self._config = vllm_config.speculative_config.settings
        parallel = vllm_config.parallel_config
        self._is_parallel = parallel.tensor_parallel_size > 1
        self._max_model_len = vllm_config.model_config.max_model_len
        self._core: DraftProposer
        self._progress: dict[int, Progress] = {}
        # Of each cache's position 0, where in its context that is.
        self._first_known = [0] * vllm_config.scheduler_config.max_num_seqs
        self.drafted: set[str] = set()
        self._statistics = DraftStatistics()
        self._faults = FaultLog(self._statistics)
        self._timer = DraftTimer(device)
        self._step_costs: StepCosts | None = None
        self.draft_attn_layer_names: set[str] = set()
        self.attn_groups: list[Any] = []
        self.draft_logits: Tensor | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Allocates everything: only what lives after this does vLLM count as used."""
        device, config = self.device, self._config
        num_slots = self.vllm_config.scheduler_config.max_num_seqs
        num_drafts, drawn_logits = config.num_speculative_tokens, None
        embedding = None
        if self.reads_features:
            embedding = embedding_for(self._config.model, target_model)
        if self._drafts:
            drawn_logits = self._load_core(target_model, embedding)
            self._temperatures = torch.zeros(num_slots, device=device)
            self._top_k = torch.zeros(num_slots, dtype=torch.int64, device=device)
        elif config.draft_sample_method == "probabilistic":
            target = self.vllm_config.model_config
            dtype = resolve_dtype(config, device.type, target.dtype)
            drawn_logits = DrawnLogits(
                num_slots, num_drafts, target.get_vocab_size(), dtype, device
            )
        threshold = config.draft_confidence_threshold
        self._output = DraftOutput(
            num_slots, num_drafts, drawn_logits, device, threshold
        )
        self.draft_logits = self._output.logits

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

    @property
    def _drafts(self) -> bool:
        """Whether this rank drafts."""
        return self._is_leader

    @property
    def _is_leader(self) -> bool:
        """Whether this rank's drafts are those of all of its tensor-parallel group."""
        return not self._is_parallel or get_tp_group().is_first_rank

    def add_request(self, request_id: str, request: Any) -> None:
        """Begins a request that the runner added, new or resumed.

        Args:
            request: vLLM's NewRequestData.
        """
        if not self._drafts:
            return
        index = self._states.req_id_to_index[request_id]
        self._progress[index] = progress = Progress(
            request_id,
            len(request.prefill_token_ids),
            is_greedy(request.sampling_params),
        )
        try:
            self._start(index, progress, request)
        except Exception as error:
            progress.waits = isinstance(error, PagePoolExhaustedError)
            progress.why_not = "no_pages" if progress.waits else "failed"
            self._faults.report(f"request {request_id}", error)

    def _start(self, index: int, progress: Progress, request: Any) -> None:
        params = request.sampling_params
        settings = parse_request_settings(params and params.extra_args, self._config)
        if settings.num_speculative_tokens == 0:
            progress.why_not = "off"
        elif request.prompt_embeds is not None:  # it has no ids to read
            progress.why_not = "embeddings"
        else:
            progress.kv_budget = settings.kv_budget
            if self._config.draft_sample_method == "probabilistic":
                sampling = draft_sampling(params)
                self._temperatures[index], self._top_k[index] = sampling
                progress.is_cut = sampling.top_k > 0
            self._begin(index, progress, request)

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

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """Drafts of every row, [num_reqs, k] int64, for vLLM's BaseSpeculator.

        Args:
            last_sampled: [max_num_reqs, 1], by index.
            num_speculative_tokens: that will be verified; k if None.
        """
        drafts = self._output.rows(input_batch.num_reqs)
        if dummy_run:
            return drafts
        indices = input_batch.idx_mapping
        if self._drafts:
            length = num_speculative_tokens
            if length is None:
                length = self._config.num_speculative_tokens
            self._statistics.set("draft_length", length)
            self._statistics.count("draft_steps", length > 0)
            last_tokens = last_sampled[indices]
            with self._timer.measure():
                try:
                    self._propose(input_batch, last_tokens, length)
                except Exception as error:
                    # Of no request in particular, so that no cache is known to be good.
                    self._reset(error)
                    self._output.repeat(indices, last_tokens)
        if self._is_parallel:
            self._output.share(indices, num_speculative_tokens != 0)
        return drafts

    def time_steps(self, runner: Any) -> None:
        """For the scheduler, if it is to adapt lengths; every rank must call it."""
        if self._config.adaptive_draft_length:
            self._step_costs = time_steps(
                runner, self._timed_core if self._drafts else None
            )

    @property
    def _timed_core(self) -> Core:
        return self._core

    def take_statistics(self) -> dict[str, Any] | None:
        """What was drafted since the last call; None where another rank drafts."""
        if not self._is_leader:
            return None
        self._observe()
        self._statistics.count("draft_seconds", self._timer.take())
        taken = self._statistics.take()
        if self._step_costs is not None:
            taken[STEP_COSTS] = self._step_costs
            self._step_costs = None
        return taken

    def _observe(self) -> None:
        self._observer.observe()

    def _propose(self, input_batch: Any, last_tokens: Tensor, length: int) -> None:
        """Drafts of the rows that can, and last tokens of the others."""
        self.drafted = set()
        self.release_ended()
        rows = self._ready(input_batch, length)
        indices = slots = input_batch.idx_mapping
        batch = [self._progress.get(i) for i in input_batch.idx_mapping_np.tolist()]
        is_told = length > 0 and not all(
            progress and progress.is_greedy for progress in batch
        )
        where: Tensor | slice = slice(input_batch.num_reqs)
        are_all_ready = len(rows) == input_batch.num_reqs
        if not are_all_ready:
            self._output.repeat(indices, last_tokens, is_told)
        if not rows:
            return
        if not are_all_ready:
            where = async_tensor_h2d(rows, device=self.device, dtype=torch.int64)
            slots = indices[where]
        drafting = [progress for row in rows if (progress := batch[row])]
        temperatures = top_k = None
        if is_told and self.draft_logits is not None:
            temperatures = self._temperatures[slots]
        if any(progress.is_cut for progress in drafting):
            top_k = self._top_k[slots]
        drafted = self._draft(slots, length, temperatures, top_k)
        self._output.fill(where, slots, drafted, last_tokens[where], temperatures)
        self.drafted = {progress.request_id for progress in drafting}
        self._faults.drafted()

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

    def leave_out(self, request_ids: list[str], drafts: list[list[int]]) -> None:
        """Cuts drafts, by row of the last batch, where they are not to be verified."""
        lengths = self._output.confident_lengths(len(drafts))
        for row, (request_id, tokens) in enumerate(
            zip(request_ids, drafts, strict=True)
        ):
            if request_id not in self.drafted:
                tokens.clear()
            elif lengths is not None:
                del tokens[lengths[row] :]
                is_none = not tokens
                self._statistics.count("drafts_skipped", is_none, "not_confident")

    def make_way(self, new_requests: Iterable[Any]) -> None:
        """To be called before requests take the places of others, or their own again.

        Args:
            new_requests: vLLM's NewRequestData.
        """
        if not self._drafts:
            return
        try:
            self.release_ended({request.req_id for request in new_requests})
        except Exception as error:
            self._reset(error)

    def release_ended(self, that_begin: Collection[str] = ()) -> None:
        """Releases the slots of requests that are over.

        Args:
            that_begin: ids of those that begin anew, as sessions do.
        """
        live: Mapping[int, str] = self._states.index_to_req_id
        for index, progress in list(self._progress.items()):
            name = progress.request_id
            if live.get(index) != name or name in that_begin:
                self._end(index, progress)

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

    def _drop(self, index: int, progress: Progress, error: Exception) -> None:
        """Ends the drafting of a request."""
        self._faults.report(f"request {progress.request_id}", error)
        self._release(index)
        progress.why_not, progress.waits = "failed", False
        self._progress[index] = progress

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
