"""The speculator of model runner V2: requests, rows and drafts, whatever drafts."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_budgetdraft.config import parse_request_settings
from vllm_budgetdraft.errors import PagePoolExhaustedError
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.memory import resolve_dtype
from vllm_budgetdraft.proposer.picking import Drafts
from vllm_budgetdraft.proposer.step_costs import StepCosts
from vllm_budgetdraft.vllm_integration.core_loader import embedding_for
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.metrics.observation import (
    DraftTimer,
)
from vllm_budgetdraft.vllm_integration.metrics.statistics import (
    STEP_COSTS,
    DraftStatistics,
)
from vllm_budgetdraft.vllm_integration.sampling import draft_sampling, is_greedy
from vllm_budgetdraft.vllm_integration.step_timing import Core, time_steps
from vllm_budgetdraft.vllm_integration.v2.draft_output import DraftOutput
from vllm_budgetdraft.vllm_integration.v2.progress import Progress
from vllm_budgetdraft.vllm_integration.v2.without_module import SpeculatorWithoutModule


class Speculator(SpeculatorWithoutModule):
    """Drafts for the rows of a batch, by the indices that the runner gives requests.

    What it drafts with, its subclasses say. Tokens, lengths and drafts stay on the
    device, and scheduling may run ahead.

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
        self._progress: dict[int, Progress] = {}
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

    @property
    def _drafts(self) -> bool:
        """Whether this rank drafts."""
        return self._is_leader

    @property
    def _is_leader(self) -> bool:
        """Whether this rank drafts for all of its tensor-parallel group."""
        return not self._is_parallel or get_tp_group().is_first_rank

    @abstractmethod
    def _load_core(
        self, target_model: nn.Module, embedding: Tensor | None
    ) -> DrawnLogits | None:
        """Loads what drafts; returns where that tells what drafts are drawn from."""

    @abstractmethod
    def _begin(self, index: int, progress: Progress, request: Any) -> None:
        """Begins to draft for a request that is to have drafts."""

    @abstractmethod
    def _ready(self, batch: Any, length: int) -> list[int]:
        """Rows that draft now, and what has to be done for others to draft later."""

    @abstractmethod
    def _draft(
        self,
        slots: Tensor,
        length: int,
        temperatures: Tensor | None,
        top_k: Tensor | None,
    ) -> Drafts:
        """Drafts of slots [B] that are ready to."""

    @abstractmethod
    def _end(self, index: int, progress: Progress) -> None:
        """Ends a request that is over; its row of the runner's states is its own."""

    @abstractmethod
    def _release(self, index: int) -> None:
        """Takes back what a request holds."""

    @abstractmethod
    def _reset(self, error: Exception) -> None:
        """Has every request begin anew after a failure of none in particular.

        After several in a row they draft no more, see ``FaultLog.report_every``.
        """

    @abstractmethod
    def _observe(self) -> None:
        """Notes what there is now, for statistics."""

    @property
    @abstractmethod
    def _timed_core(self) -> Core:
        """What drafts, to be timed."""

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

    def note_batch(self, batch: Any) -> None:
        """Is told of a batch before the target's pass, for who drafts along with it."""

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

    def _drop(self, index: int, progress: Progress, error: Exception) -> None:
        """Ends the drafting of a request."""
        self._faults.report(f"request {progress.request_id}", error)
        self._release(index)
        progress.why_not, progress.waits = "failed", False
        self._progress[index] = progress
