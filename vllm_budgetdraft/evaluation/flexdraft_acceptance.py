"""FlexDraft's acceptance, measured as every drafter's is."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.evaluation.acceptance import HeldOutAcceptance
from vllm_budgetdraft.flexdraft.checkpoint import load_flexdraft
from vllm_budgetdraft.flexdraft.decoding import FlexDecoder
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.flexdraft.target_pass import ContextCache
from vllm_budgetdraft.proposer.picking import Drafts


class FlexDraftAcceptance(HeldOutAcceptance):
    """Measures FlexDraft folders of one target on held-out prompts."""

    def __init__(
        self, target: PreTrainedModel, *args: Any, page_size: int, **kwargs: Any
    ) -> None:
        """
        Args:
            page_size: tokens per page that a budget keeps or drops.
        """
        super().__init__(target, *args, **kwargs)
        fields = EvictionSettings.model_fields.keys() & self.settings.keys()
        settings = EvictionSettings(**{name: self.settings[name] for name in fields})
        self._selector = PageSelector(settings, page_size)

    def _proposer(self, drafter: Path) -> "SequentialDrafter":
        target, num_cells = self._target, self._longest + self._num_drafts + 1
        decoder = FlexDecoder(
            target,
            load_flexdraft(
                drafter,
                target,
                max_positions=num_cells,
                dtype=target.dtype,
                device=target.device,
            ),
            num_drafts=self._num_drafts,
            selector=self._selector,
        )
        return SequentialDrafter(decoder, num_cells, target.device, self._seed)


class SequentialDrafter:
    """A ``FlexDecoder`` with the face of a ``DraftProposer`` of one slot."""

    def __init__(
        self, decoder: FlexDecoder, num_cells: int, device: torch.device, seed: int
    ) -> None:
        self.device = device
        self._decoder, self._num_cells = decoder, num_cells
        self._generator = torch.Generator(device).manual_seed(seed)
        self._cache: ContextCache
        self._unread: Tensor | None = None

    def start_request(self, slot: int, kv_budget: int) -> None:
        self._cache = self._decoder.new_cache(1, self._num_cells)
        self._unread = None

    def ingest(self, slot: int, tokens: Tensor, kv_budget: int) -> None:
        self._decoder.read(self._cache, tokens, kv_budget)

    def draft(
        self,
        slots: Tensor,
        tokens: Tensor,
        ends: Tensor,
        num_drafts: int | None = None,
        temperatures: Tensor | None = None,
    ) -> Drafts:
        """See ``DraftProposer.draft``; every slot of a draft is asked for.

        What the target accepted of the last draft is read first, as verification
        would have done.
        """
        cache, bonus = self._cache, tokens[:, -1]
        unread = tokens[:, 0] if self._unread is None else self._unread
        self._decoder.extend(cache, unread[: int(ends) - 1 - int(cache.lengths)])
        temperature = 0.0 if temperatures is None else float(temperatures)
        drafts = self._decoder.draft(cache, bonus, temperature, self._generator)
        self._unread = torch.cat([bonus, drafts.tokens[0]])
        return drafts

    def release_request(self, slot: int) -> None:
        del self._cache
