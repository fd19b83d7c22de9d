"""Drafting with a target's own cache: fixed slots, tensors in, tensors out."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from budgetdraft_kernels import reference
from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.flexdraft.mask_loop import MaskLoop
from vllm_budgetdraft.flexdraft.modeling import FlexDraft, TargetParts
from vllm_budgetdraft.flexdraft.page_lists import PageLists
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.proposer.draft_calls import DraftCalls
from vllm_budgetdraft.proposer.draft_graphs import Capture
from vllm_budgetdraft.proposer.draft_length import ladder
from vllm_budgetdraft.proposer.draft_loop import DraftInputs
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.picking import Drafts, Picker


class MaskProposer:
    """What ``DraftProposer`` is, for mask tokens: they have no cache of their own.

    Attributes:
        max_drafts: k.
        max_model_len: tokens of a context, at most.
        drawn_logits: what drafts are drawn from, if it is told as logits.
        loop: its work on the device.
    """

    def __init__(
        self,
        drafter: FlexDraft,
        target: Any,
        config: SettledConfig,
        operations: ModuleType,
        *,
        num_slots: int,
        max_model_len: int,
        seed: int,
        tells_logits: bool = False,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            target: a causal language model of ``transformers`` or vLLM.
            operations: see ``select_operations``.
            tells_logits: see ``build_proposer``.
            gather: see ``TargetParts``.
        """
        self.drafter, self.config = drafter, config
        self.max_drafts = config.num_speculative_tokens
        self.device = drafter.mask_embedding.device
        self._num_slots, self.max_model_len = num_slots, max_model_len
        self._operations = operations
        draws = config.draft_sample_method == "probabilistic"
        vocab_size = drafter.config.vocab_size
        self.drawn_logits: DrawnLogits | None = None
        if draws and tells_logits:
            self.drawn_logits = DrawnLogits(
                num_slots,
                self.max_drafts,
                vocab_size,
                drafter.mask_embedding.dtype,
                self.device,
            )
        self._picker = Picker(
            operations,
            num_slots=num_slots,
            max_drafts=self.max_drafts,
            vocab_size=vocab_size,
            draws=draws,
            drawn_logits=self.drawn_logits,
            draft_ids=None,
            device=self.device,
        )
        parts = TargetParts(target, drafter.num_layers, gather)
        self.loop = MaskLoop(drafter, parts, operations, self._picker, self.max_drafts)
        self._calls = DraftCalls(self.loop, config, self.device, seed)
        self._keys: list[Tensor] = []
        self._reserved: Tensor | None = None

    @property
    def num_graphs(self) -> int:
        """Graphs that drafts replay; 0 where they run eagerly."""
        return self._calls.num_graphs

    @property
    def scratch_bytes(self) -> int:
        """Of drafts' distributions."""
        return self._picker.num_bytes

    def reserve_for_graphs(self) -> None:
        """Holds the memory that graphs will take until they are captured.

        An engine measures what is held, and graphs need the target's cache, which the
        engine makes afterwards.
        """
        drafts = self._num_slots * self.max_drafts
        logits = 2 * drafts * self.drafter.config.vocab_size  # and what corrects them
        mask = self.drafter.mask_embedding
        self._reserved = torch.empty(logits, dtype=mask.dtype, device=self.device)

    def bind(self, pages: list[tuple[Tensor, Tensor]]) -> None:
        """Takes the target's cache, once the engine has it.

        Args:
            pages: of each of the last layers, [num_pages, P, G, D] keys and values.
        """
        _, page_size, num_kv_heads, _ = pages[0][0].shape
        lists = PageLists(
            PageSelector(self.config, page_size),
            num_layers=self.drafter.num_layers,
            num_kv_heads=num_kv_heads,
            num_slots=self._num_slots,
            max_tokens=self.max_model_len,
            kv_budget=self.config.budget(self.max_model_len),
            recent_window=self.config.recent_window,
            device=self.device,
        )
        self._keys = [keys for keys, _ in pages]
        self.loop.bind(pages, lists)

    def choose(
        self, slot: int, blocks: Tensor, num_tokens: int, kv_budget: int | None
    ) -> None:
        """Chooses what drafts of a slot see of its prompt, which is in the cache.

        Args:
            blocks: [max_pages or more], where the engine has the prompt's pages.
            num_tokens: of the prompt.
            kv_budget: of this request; the configured one if None.
        """
        budget = kv_budget or self.config.budget(self.max_model_len)
        self.loop.lists.choose(slot, blocks, num_tokens, self._keys, budget)

    def place(self, slots: Tensor, blocks: Tensor) -> None:
        """See ``PageLists``; to be called before a draft."""
        self.loop.lists.place(slots, blocks)

    @torch.inference_mode()
    def draft(
        self,
        slots: Tensor,
        tokens: Tensor,
        ends: Tensor,
        num_drafts: int | None = None,
        temperatures: Tensor | None = None,
        top_k: Tensor | None = None,
        *,
        validate: bool = False,
    ) -> Drafts:
        """Drafts for every request at once, as ``DraftProposer.draft`` does.

        Args:
            slots: [B] int64, distinct.
            tokens: [B, 1] int64, the bonus tokens, which no cache has yet.
            ends: [B] int64, context lengths, bonus tokens included.
        """
        num_drafts = num_drafts or self.max_drafts
        draws = self._calls.draws(temperatures, num_drafts, top_k)
        inputs = DraftInputs(slots, ends, tokens, draws)
        return self._calls.draft(inputs, num_drafts, validate=validate)

    def warm_up_head(self) -> None:
        """Drafts from nothing for as many as can be, which needs no cache.

        It takes the memory that drafts will take, where the engine measures that.
        """
        for draws in self._kinds(self._num_slots):
            self.pick_for_nobody(self._num_slots, self.max_drafts, *draws)

    def warm_up(self) -> None:
        """Drafts for nobody, so that no request waits for kernels to be compiled."""
        is_compiled = self._operations is not reference
        for size in ladder(self._num_slots) if is_compiled else [1]:
            for draws in self._kinds(size):
                self.draft_for_nobody(size, self.max_drafts, *draws)

    def _kinds(self, batch: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Temperatures [B] and top-k [B], as drafts may have them."""
        yield None, None
        if self.config.draft_sample_method == "probabilistic":
            temperatures = torch.ones(batch, device=self.device)
            yield temperatures, None
            yield temperatures, torch.ones_like(temperatures, dtype=torch.int64)

    @torch.inference_mode()
    def pick(
        self,
        hidden: Tensor,
        slots: Tensor,
        bonus: Tensor,
        temperatures: Tensor | None = None,
        top_k: Tensor | None = None,
    ) -> Drafts:
        """Drafts from mask tokens that went along with the target: ``ParallelRound``.

        Args:
            hidden: [B, num_drafts, hidden_size], normed.
            slots: [B] int64.
            bonus: [B] int64, the bonus tokens.
            temperatures, top_k: as of ``draft``.
        """
        draws = self._calls.draws(temperatures, hidden.shape[1], top_k)
        return self.loop.pick(hidden, slots, bonus, draws, validate=False)

    def draft_for_nobody(
        self, batch: int, num_drafts: int, *draws: Tensor | None
    ) -> Tensor:
        """Tokens of a draft over lists as long as they get, to be timed."""
        slots = torch.full((batch,), self.loop.lists.spare_slot, device=self.device)
        ends = torch.full_like(slots, self.max_model_len - num_drafts - 1)
        tokens = torch.zeros_like(slots)[:, None]
        return self.draft(slots, tokens, ends, num_drafts, *draws).tokens

    def pick_for_nobody(
        self, batch: int, num_drafts: int, *draws: Tensor | None
    ) -> Tensor:
        """The same of a draft whose mask tokens went along with the target."""
        mask = self.drafter.mask_embedding
        hidden = mask.new_zeros((batch, num_drafts, len(mask)))
        slots = torch.arange(batch, device=self.device)
        return self.pick(hidden, slots, torch.zeros_like(slots), *draws).tokens

    def capture_graphs(self, capture: Capture) -> int:
        """From now on drafts replay graphs, which ``capture`` makes.

        Returns:
            How many were captured.
        """
        self.loop.lists.are_cut, self._reserved = False, None
        torch.cuda.empty_cache()  # for graphs have memory of their own
        return self._calls.capture(
            capture,
            num_slots=self._num_slots,
            spare_slot=self.loop.lists.spare_slot,
            width=1,  # the bonus token alone
        )
