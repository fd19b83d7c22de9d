"""Rounds in which the target drafts while it verifies, in vLLM's model runner V1."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available

from vllm_budgetdraft.flexdraft.parallel_round import ParallelRound
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.flexdraft.switch import FlexSwitch, Mode
from vllm_budgetdraft.vllm_integration.beside_target import put_beside
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.request_slots import RequestSlots
from vllm_budgetdraft.vllm_integration.step_timing import time_steps


class _PickOnly:
    """What is left of a draft after a parallel round, to be timed."""

    def __init__(self, core: MaskProposer) -> None:
        self._core = core

    def draft_for_nobody(self, batch: int, num_drafts: int) -> Tensor:
        return self._core.pick_for_nobody(batch, num_drafts)


class FlexRounds:
    """Begins parallel rounds in the target's pass, and says when it pays.

    Attributes:
        mode: of the next pass.
    """

    def __init__(
        self, core: MaskProposer, slots: RequestSlots, faults: FaultLog, mode: str
    ) -> None:
        """
        Args:
            mode: "auto" for what pays best.
        """
        self._core, self._slots, self._faults = core, slots, faults
        self._masks = ParallelRound(core.loop, core.drafter)
        self._is_auto = mode == "auto"
        self.mode: Mode = "parallel" if mode == "parallel" else "sequential"
        self._runner: Any = None
        self._switch: FlexSwitch | None = None
        self._is_rehearsing = False
        # Of the step before: its mode, requests and length, and when it ended.
        self._last: tuple[Mode, Sequence[str], int, float] | None = None
        self._made_in: Mode = "sequential"
        self._was_round = False
        put_beside(core.loop.parts.layers, self._masks, self._begin, self._report)

    def time_steps(self, runner: Any) -> None:
        """Times both modes, if one is to be chosen, when all is compiled."""
        self._runner = runner
        if not self._is_auto:
            return
        sequential = time_steps(runner, self._core)
        self._is_rehearsing = True
        try:
            parallel = time_steps(runner, _PickOnly(self._core))
        finally:
            self._is_rehearsing = False
        if sequential and parallel:
            self._switch = FlexSwitch({"sequential": sequential, "parallel": parallel})

    def _begin(self, num_tokens: int) -> None:
        """Begins a round if this pass is to be one, and of decoding requests alone."""
        self._masks.cancel()
        if self._is_rehearsing:
            places = torch.full((num_tokens,), self._core.loop.lists.spare_slot)
            ends = torch.full_like(places, self._core.max_model_len - 1)
            device = self._core.device
            self._masks.begin(places.to(device), ends.to(device))
            return
        if self.mode == "sequential" or not is_forward_context_available():
            return
        metadata = get_forward_context().attn_metadata
        if self._runner is None or not isinstance(metadata, dict):
            return
        runner, slots = self._runner, []
        for request_id in runner.input_batch.req_ids:
            holding = self._slots.get(request_id, runner.requests[request_id])
            if holding is None:
                return
            slots.append(holding.slot)
        layer = self._core.loop.parts.layers[0]
        of_batch = metadata[layer.self_attn.attn.layer_name]
        count = of_batch.num_actual_tokens
        if count > len(slots) * self._core.loop.block:  # somebody goes on with a prompt
            return
        device = self._core.device
        of_requests = torch.tensor(slots, device=device)
        starts = of_batch.query_start_loc[: len(slots) + 1].long()
        row = torch.repeat_interleave(starts.diff(), output_size=count)
        # Its last token stands at the end of what the request has in the cache.
        ends = (of_batch.seq_lens[: len(slots)] - starts[1:])[row]
        positions = ends + torch.arange(count, device=device)
        self._core.place(of_requests, of_batch.block_table[: len(slots)])
        self._masks.begin(of_requests[row], positions)

    def _report(self, error: Exception) -> None:
        self._faults.report("a parallel round", error)

    def take(self, rows: Sequence[int], num_drafts: int) -> Tensor | None:
        """States of mask tokens after the rows [B] of the pass, if it was a round.

        Returns:
            [B, num_drafts, hidden_size], normed.
        """
        self._was_round = self._masks.is_on
        if not self._was_round:
            return None
        return self._masks.end(torch.tensor(rows, device=self._core.device), num_drafts)

    def next(
        self,
        requests: Sequence[str],
        outcomes: Mapping[str, tuple[int, int]],
        length: int,
        *,
        are_undisturbed: bool,
    ) -> None:
        """Ends a step, and chooses the mode of the next one.

        Args:
            requests: by id, of the batch.
            outcomes: of drafts that this step verified, see ``Acceptance.record``.
            length: most tokens that were drafted.
            are_undisturbed: whether all of them drafted.
        """
        if self._switch is None:
            return
        now = time.perf_counter()
        mode: Mode = "parallel" if self._was_round else "sequential"
        self._was_round = False
        self._switch.accepted(self._made_in, requests, outcomes)
        self._made_in = mode
        if self._last is not None and are_undisturbed:
            last_mode, last_requests, last_length, ended = self._last
            if (last_mode, last_requests) == (mode, requests):
                self._switch.took(mode, len(requests), last_length, now - ended)
        self._last = (mode, requests, length, now) if are_undisturbed else None
        self.mode = self._switch.choose(requests, length)
