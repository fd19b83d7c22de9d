"""Calls of a draft loop: run as they are, or replayed as graphs."""

import torch
from torch import Tensor

from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.proposer.draft_graphs import Capture, DraftGraphs, Loop
from vllm_budgetdraft.proposer.draft_length import draft_lengths, ladder
from vllm_budgetdraft.proposer.draft_loop import DraftInputs, Fed
from vllm_budgetdraft.proposer.picking import Drafts, Draws


class DraftCalls:
    """Gives a draft loop the noise that it draws by, and graphs once there are any.

    Attributes:
        num_graphs: graphs that drafts replay; 0 where they run eagerly.
    """

    def __init__(
        self, loop: Loop, config: SettledConfig, device: torch.device, seed: int
    ) -> None:
        self._loop, self._config, self._device = loop, config, device
        self._draws = config.draft_sample_method == "probabilistic"
        if self._draws:
            # Its own, for verification must not know the noise of what it verifies.
            self._generator = torch.Generator(device).manual_seed(seed)
        self._graphs: DraftGraphs | None = None
        self.num_graphs = 0

    def draws(
        self, temperatures: Tensor | None, num_drafts: int, top_k: Tensor | None
    ) -> Draws | None:
        """How tokens are drawn at temperatures [B]; None where there are none."""
        if temperatures is None:
            return None
        shape = (num_drafts, len(temperatures))
        uniforms = torch.rand(shape, generator=self._generator, device=self._device)
        return Draws(temperatures, uniforms, top_k)

    def draft(self, inputs: DraftInputs, num_drafts: int, *, validate: bool) -> Drafts:
        """See ``DraftProposer.draft``."""
        if self._graphs is not None:
            return self._graphs.draft(inputs, num_drafts)
        return self._loop.draft(inputs, num_drafts, validate=validate)

    def capture(
        self,
        capture: Capture,
        *,
        num_slots: int,
        spare_slot: int,
        width: int,
        fed: Fed | None = None,
    ) -> int:
        """From now on drafts replay graphs, which ``capture`` makes.

        Args:
            num_slots: the largest batch.
            spare_slot, width, fed: see ``DraftGraphs``.

        Returns:
            How many were captured.
        """
        graphs = DraftGraphs(
            self._loop,
            spare_slot=spare_slot,
            sizes=ladder(num_slots),
            lengths=draft_lengths(self._config),
            draws=self._draws,
            device=self._device,
            width=width,
            fed=fed,
        )
        self.num_graphs = graphs.capture(capture)
        self._graphs = graphs
        return self.num_graphs
