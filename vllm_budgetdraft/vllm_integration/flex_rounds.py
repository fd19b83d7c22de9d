"""Rounds in which the target drafts while it verifies, in a vLLM engine."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.flexdraft.parallel_round import ParallelRound
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.flexdraft.switch import FlexSwitch, Mode
from vllm_budgetdraft.vllm_integration.beside_target import put_beside
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.step_timing import time_steps


class _PickOnly:
    """What is left of a draft after a parallel round, to be timed."""

    def __init__(self, core: MaskProposer) -> None:
        self._core = core

    def draft_for_nobody(self, batch: int, num_drafts: int) -> Tensor:
        return self._core.pick_for_nobody(batch, num_drafts)


def rounds_for(
    core: MaskProposer,
    vllm_config: VllmConfig,
    faults: FaultLog,
    tokens_of_pass: Callable[[], tuple[Tensor, Tensor] | None],
    *,
    can_choose: bool,
) -> "FlexRounds | None":
    """Parallel rounds, if there may be any. To be called before a target is compiled.

    Args:
        can_choose: whether ``FlexRounds.next`` will be told what it needs.

    Raises:
        UnsupportedVllmError: they were asked for, and cannot be had.
    """
    mode = core.config.flex_decoding
    if mode == "sequential" or not core.drafter.drafts_blind:
        return None
    if mode == "auto" and not can_choose:
        return None
    if is_gpu(core.device) and not vllm_config.model_config.enforce_eager:
        if mode == "parallel":
            raise UnsupportedVllmError(
                "flex_decoding='parallel' where the target runs as CUDA graphs, which "
                "would not have the mask tokens in them; use enforce_eager=True, or "
                "flex_decoding='auto'"
            )
        return None
    return FlexRounds(core, faults, mode, tokens_of_pass)


class FlexRounds:
    """Begins parallel rounds in the target's pass, and says when it pays.

    Attributes:
        mode: of the next pass.
    """

    def __init__(
        self,
        core: MaskProposer,
        faults: FaultLog,
        mode: str,
        tokens_of_pass: Callable[[], tuple[Tensor, Tensor] | None],
    ) -> None:
        """
        Args:
            mode: "auto" for what pays best.
            tokens_of_pass: asked in a pass of the target, for the slots and positions
                [T] of its tokens, whose pages the core has been told; None if they are
                not those of requests that draft.
        """
        self._core, self._faults = core, faults
        self._tokens_of_pass = tokens_of_pass
        self._masks = ParallelRound(core.loop, core.drafter)
        self._is_auto = mode == "auto"
        self.mode: Mode = "parallel" if mode == "parallel" else "sequential"
        self._switch: FlexSwitch | None = None
        self._is_rehearsing = False
        # Of the step before: its mode, requests and length, and when it ended.
        self._last: tuple[Mode, Sequence[str], int, float] | None = None
        self._made_in: Mode = "sequential"
        self._was_round = False
        put_beside(core.loop.parts.layers, self._masks, self._begin, self._report)

    def time_steps(self, runner: Any) -> None:
        """Times both modes, if one is to be chosen, when all is compiled."""
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
            lists, device = self._core.loop.lists, self._core.device
            slots = torch.full((num_tokens,), lists.spare_slot, device=device)
            last = self._core.max_model_len - self._core.max_drafts - 2
            self._masks.begin(slots, torch.full_like(slots, last))
        elif self.mode == "parallel" and (tokens := self._tokens_of_pass()):
            self._masks.begin(*tokens)

    def _report(self, error: Exception) -> None:
        self._faults.report("a parallel round", error)

    def take(self, rows: Tensor, num_drafts: int) -> Tensor | None:
        """States of mask tokens after the rows [B] of the pass, if it was a round.

        Returns:
            [B, num_drafts, hidden_size], normed.
        """
        self._was_round = self._masks.is_on
        if not self._was_round:
            return None
        return self._masks.end(rows, num_drafts)

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
