"""What mask tokens do in vLLM: device work alone, so that a graph can hold it."""

from types import ModuleType

import torch
from torch import Tensor

from vllm_budgetdraft.flexdraft.attention import MaskAttention
from vllm_budgetdraft.flexdraft.modeling import Attend, FlexDraft, TargetParts
from vllm_budgetdraft.flexdraft.page_lists import PageLists
from vllm_budgetdraft.proposer.draft_loop import DraftInputs
from vllm_budgetdraft.proposer.picking import Drafts, Draws, Picker


class MaskLoop:
    """Mask tokens through a target's last layers, and drafts from their states.

    Attributes:
        parts: of the target, those that mask tokens use.
        block: mask tokens of a draft, however many of them are picked: they see each
            other, so that a draft of fewer would be another one.
        lists: of the pages that they see; set by ``bind``.
    """

    def __init__(
        self,
        drafter: FlexDraft,
        parts: TargetParts,
        operations: ModuleType,
        picker: Picker,
        max_drafts: int,
    ) -> None:
        self.parts, self.block = parts, max_drafts + 1
        self.lists: PageLists
        self._drafter, self._operations, self._picker = drafter, operations, picker
        self._pages: list[tuple[Tensor, Tensor]] = []

    def bind(self, pages: list[tuple[Tensor, Tensor]], lists: PageLists) -> None:
        """
        Args:
            pages: of each of the last layers, [num_pages, P, G, D] keys and values.
        """
        self._pages, self.lists = pages, lists

    def draft(self, inputs: DraftInputs, num_drafts: int, *, validate: bool) -> Drafts:
        """Drafts after bonus tokens, which are the last tokens and in no cache yet."""
        bonus = inputs.tokens[:, 0]
        attend = self.attention(inputs.slots, inputs.ends - 1, validate)
        masks = self._drafter.masks(self.parts.embed(bonus), self.block)
        hidden = self._drafter(masks.flatten(0, 1), self.parts, attend)
        hidden = hidden.unflatten(0, (-1, self.block))[:, 1 : num_drafts + 1]
        return self.pick(hidden, inputs.slots, bonus, inputs.draws, validate)

    def attention(self, slots: Tensor, ends: Tensor, validate: bool) -> Attend:
        """Of groups of mask tokens, to what the cache has and to their own group.

        Args:
            slots: [B], of each group.
            ends: [B], tokens that the cache has before each group, which stands there.
        """
        offsets = torch.arange(self.block, device=ends.device)
        tables, lengths = self.lists.tables(slots, ends)
        return MaskAttention(
            self._operations,
            self._pages,
            tables,
            lengths,
            self._drafter.rotary((ends[:, None] + offsets).flatten()),
            self.block,
            validate=validate,
        )

    def pick(
        self,
        hidden: Tensor,
        slots: Tensor,
        bonus: Tensor,
        draws: Draws | None,
        validate: bool,
    ) -> Drafts:
        """Drafts from normed states of mask tokens, [B, k, hidden_size].

        Args:
            slots: [B].
            bonus: [B], the bonus tokens.
        """
        picker = self._picker
        drafts = picker.begin(slots, hidden.shape[1], draws)

        def pick(place: int, logits: Tensor) -> Tensor:
            return picker.pick(drafts, place, slots, logits, draws, validate=validate)

        self._drafter.draft(hidden, self.parts, bonus, pick)
        return drafts
