"""Rounds in which the target drafts while it verifies, in a vLLM engine."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.flexdraft.parallel_round import ParallelRound
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.flexdraft.switch import FlexSwitch, Mode
from vllm_budgetdraft.proposer.step_costs import StepCosts
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
    """
    mode = core.config.flex_decoding
    as_graphs = is_gpu(core.device) and not vllm_config.model_config.enforce_eager
    if mode == "sequential" or not core.drafter.drafts_blind:
        return None
    if mode == "auto" and (as_graphs or not can_choose):
        return None
    max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    return FlexRounds(core, faults, mode, tokens_of_pass, max_tokens)


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
        max_tokens: int,
    ) -> None:
        """
        Args:
            mode: "auto" for what pays best.
            tokens_of_pass: asked in a pass of the target, for the slots and positions
                [T] of its tokens, whose pages the core has been told; None if they are
                not those of requests that draft.
            max_tokens: of a pass, for which vLLM has measured that there is memory.
        """
        self._core, self._faults = core, faults
        self._tokens_of_pass, self._max_tokens = tokens_of_pass, max_tokens
        self._masks = ParallelRound(core.loop, core.drafter)
        self._is_auto = mode == "auto"
        self.mode: Mode = "parallel" if mode == "parallel" else "sequential"
        self._switch: FlexSwitch | None = None
        self._is_rehearsing = False
        # Whether the last step drafted, and whether it did so in the target's pass.
        self._is_wanted = self._was_round = False
        # The mode in which the drafts were made that the target verifies next.
        self._made_in: Mode = "sequential"
        # Of the last step, if all drafted: mode, requests, length, and when it ended.
        self._last: tuple[Mode, Sequence[str], int, float] | None = None
        put_beside(core.loop.parts.layers, self._masks, self._begin, self._report)

    def time_steps(self, runner: Any) -> StepCosts | None:
        """Times the modes that there may be, when all is compiled; None if it fails.

        Returns:
            Costs of the mode that was asked for, and of "sequential" for "auto".
        """
        sequential = time_steps(runner, self._core) if self._is_auto else None
        self._is_rehearsing = True
        try:
            parallel = time_steps(runner, _PickOnly(self._core))
        finally:
            self._is_rehearsing = False
        if not self._is_auto:
            return parallel
        if sequential and parallel:
            self._switch = FlexSwitch({"sequential": sequential, "parallel": parallel})
        return sequential

    def _begin(self, num_tokens: int) -> None:
        """Begins a round if this pass is to be one, and of decoding requests alone."""
        self._masks.cancel()
        if num_tokens * (1 + self._core.loop.block) > self._max_tokens:
            return
        if self._is_rehearsing:
            lists, device = self._core.loop.lists, self._core.device
            slots = torch.full((num_tokens,), lists.spare_slot, device=device)
            last = self._core.max_model_len - self._core.max_drafts - 2
            self._masks.begin(slots, torch.full_like(slots, last))
        elif self._is_wanted and self.mode == "parallel":
            if tokens := self._tokens_of_pass():
                self._masks.begin(*tokens)

    def _report(self, error: Exception) -> None:
        self._faults.report("a parallel round", error)

    def begin_step(self) -> None:
        """Says that the target's pass is over, and whoever is to draft will."""
        if not self._is_wanted:
            self._last = None
        self._is_wanted = self._was_round = False

    def take(self, rows: Tensor, num_drafts: int) -> Tensor | None:
        """States of mask tokens after the rows [B] of the pass, if it was a round.

        Returns:
            [B, num_drafts, hidden_size], normed.
        """
        self._is_wanted, self._was_round = True, self._masks.is_on
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
        now, requests = time.perf_counter(), list(requests)  # vLLM's list changes
        mode: Mode = "parallel" if self._was_round else "sequential"
        self._switch.accepted(self._made_in, requests, outcomes)
        self._made_in = mode
        if self._last is not None and are_undisturbed:
            last_mode, last_requests, last_length, ended = self._last
            if (last_mode, last_requests) == (mode, requests):
                self._switch.took(mode, len(requests), last_length, now - ended)
        self._last = (mode, requests, length, now) if are_undisturbed else None
        self.mode = self._switch.choose(requests, length)
