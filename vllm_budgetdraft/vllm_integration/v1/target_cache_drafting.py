"""Drafts by the target itself: FlexDraft's mask tokens over the target's own cache."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available

from vllm_budgetdraft.config import parse_request_settings
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.flex_rounds import FlexRounds, rounds_for
from vllm_budgetdraft.vllm_integration.metrics.observation import DraftTimer
from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics
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


class TargetCacheDrafting:
    """``Drafting`` without a cache of its own, by FlexDraft: nothing is read twice.

    Of a ``Holding``, ``num_cached`` is the length of the prompt that was chosen from.

    Attributes:
        runner: vLLM's, once there is one.
    """

    def __init__(self, core: MaskProposer, num_slots: int) -> None:
        self._core = core
        self._slots = RequestSlots(num_slots)
        self._batch: list[Request] = []
        self.statistics = DraftStatistics()
        self._faults = FaultLog(self.statistics)
        self.timer = DraftTimer(core.device)
        self.probabilities: tuple[list[str], Tensor] | None = None
        self.has_only_drafted = False
        self._rounds: FlexRounds | None = None
        self.runner: Any = None

    def allow_rounds(self, vllm_config: VllmConfig) -> FlexRounds | None:
        """Lets drafts be made in the target's own pass; see ``rounds_for``."""
        self._rounds = rounds_for(
            self._core, vllm_config, self._faults, self._tokens_of_pass, can_choose=True
        )
        return self._rounds

    def _tokens_of_pass(self) -> tuple[Tensor, Tensor] | None:
        """See ``FlexRounds``; what vLLM has prepared for its attention knows where."""
        if self.runner is None or not is_forward_context_available():
            return None
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a pass of no requests
            return None
        slots, batch = [], self.runner.input_batch
        for row, request_id in enumerate(batch.req_ids):
            state = self.runner.requests[request_id]
            holding = self._slots.get(request_id, state)
            if self._slots.why_given_up(request_id, state):
                slots.append(self._core.loop.lists.spare_slot)
            elif holding and batch.num_computed_tokens_cpu[row] >= holding.num_cached:
                slots.append(holding.slot)
            else:  # it begins, or begins again
                return None
        layer = self._core.loop.parts.layers[0]
        of_pass = metadata[layer.self_attn.attn.layer_name]
        count = of_pass.num_actual_tokens
        if count > len(slots) * self._core.loop.block:  # somebody goes on with a prompt
            return None
        starts = of_pass.query_start_loc[: len(slots) + 1].long()
        rows = torch.repeat_interleave(starts.diff(), output_size=count)
        # The last token of a request stands at the end of what the cache will have.
        shift = (of_pass.seq_lens[: len(slots)] - starts[1:])[rows]
        positions = shift + torch.arange(count, device=self._core.device)
        of_rows = self._tensor(slots)
        self._core.place(of_rows, of_pass.block_table[: len(slots)])
        return of_rows[rows], positions

    def observe(self) -> None:
        """Notes what drafting took; there is no draft cache."""
        self.statistics.set("cuda_graphs", self._core.num_graphs)
        self.statistics.count("draft_seconds", self.timer.take())

    def warm_up(self) -> None:
        """Without the target's cache, which vLLM has yet to measure the room for."""
        self._core.warm_up_head()

    def reset(self, error: Exception) -> None:
        """See ``Drafting``."""
        if self._faults.report_every(error):
            for each in self._batch:
                self._slots.give_up(each.request_id, each.state, "failed")
        self._slots.release_all()
        self.probabilities = None

    def forget_ended(self, live: Mapping[str, Any]) -> None:
        """See ``Drafting``."""
        for request_id in self._slots.ended(live):
            self._slots.release(request_id)
        self._slots.forget_ended(live)

    def draft(
        self, requests: list[Request], is_trial: bool = False
    ) -> dict[int, list[int]]:
        """Drafts by row, of the rows that have sampled and do not fail."""
        self.probabilities = None
        self._batch = requests
        batch = {request.request_id for request in requests}
        ready = []
        for request in requests:
            given_up = self._slots.why_given_up(request.request_id, request.state)
            if given_up or not (request.sampled and request.max_drafts):
                continue
            try:
                holding = self._holding(request, batch)
                if holding is None:
                    self._slots.give_up(request.request_id, request.state, "off")
                else:
                    ready.append((request, holding))
            except Exception as error:
                self._drop(request, error)
        drafts = self._draft(ready) if ready else {}
        if drafts:
            self._faults.drafted()
        self.has_only_drafted = len(drafts) == len(requests)
        for request in requests:
            if request.sampled and not drafts.get(request.row):
                self.statistics.count("drafts_skipped", label=self._why_not(request))
        return drafts

    def _why_not(self, request: Request) -> str:
        """Why a request that sampled has no drafts."""
        if reason := self._slots.why_given_up(request.request_id, request.state):
            return reason
        return "not_confident" if request.max_drafts else "draft_length"

    def _holding(self, request: Request, batch: set[str]) -> Holding | None:
        """A slot, in which is chosen what is seen of the prompt.

        Returns:
            None for a request that asked for no drafts.
        """
        holding = self._slots.get(request.request_id, request.state)
        if holding is None:
            params, config = request.state.sampling_params, self._core.config
            settings = parse_request_settings(params and params.extra_args, config)
            if settings.num_speculative_tokens == 0:
                return None
            sampling = DraftSampling()
            if config.draft_sample_method == "probabilistic":
                sampling = draft_sampling(params)
            if not self._slots.num_free:  # preempted ones keep theirs, if they can
                self._slots.release(self._slots.idle(batch)[0])
            holding = self._slots.take(
                request.request_id, request.state, settings=settings, sampling=sampling
            )
        num_prompt = request.state.num_prompt_tokens
        if holding.num_cached != num_prompt:  # a session's prompt grows
            blocks = self._tensor(request.block_tables[0])
            budget = holding.settings.kv_budget
            self._core.choose(holding.slot, blocks, num_prompt, budget)
            holding.num_cached = num_prompt
        return holding

    def _draft(self, ready: list[tuple[Request, Holding]]) -> dict[int, list[int]]:
        count = max(max_drafts(request, each.settings) for request, each in ready)
        draws = as_tensors([each.sampling for _, each in ready], self._core.device)
        states = None
        if self._rounds is not None:
            last = [each.first_state + each.num_accepted for each, _ in ready]
            states = self._rounds.take(self._tensor(last), count)
        blocks = np.stack([request.block_tables[0] for request, _ in ready])
        ends = [
            (holding.slot, len(request.context), request.context[-1])
            for request, holding in ready
        ]
        # At once, for each copy to a GPU makes the host wait.
        rows = self._tensor(np.concatenate([np.array(ends), blocks], 1))
        slots, bonus = rows[:, 0], rows[:, 2]
        if states is not None:
            drafts = self._core.pick(states, slots, bonus, *draws)
        else:
            self._core.place(slots, rows[:, 3:])
            drafts = self._core.draft(slots, rows[:, 2:3], rows[:, 1], count, *draws)
        tokens, confidences, probabilities = drafts
        if probabilities is not None:
            self.probabilities = [each.request_id for each, _ in ready], probabilities
        threshold = self._core.config.draft_confidence_threshold
        found = {}
        for (request, holding), drafted in zip(
            ready, marked(tokens, confidences, threshold), strict=True
        ):
            if NOT_FINITE in drafted:
                self._drop(request, FloatingPointError("logits are not finite"))
            else:
                limit = max_drafts(request, holding.settings)
                found[request.row] = confident(drafted)[:limit]
        return found

    def _tensor(self, data: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(data, dtype=dtype).to(self._core.device)

    def _drop(self, request: Request, error: Exception) -> None:
        """Ends the drafting of a request."""
        if self._slots.get(request.request_id, request.state):
            self._slots.release(request.request_id)
        self._slots.give_up(request.request_id, request.state, "failed")
        self._faults.report(f"request {request.request_id}", error)
