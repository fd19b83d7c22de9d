"""Lists of the target's pages that mask tokens see, on the device, by slot.

Letters in shapes: L layers, B requests, G KV heads, D head size, N pages of a list.
"""

import torch
from torch import Tensor

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.flexdraft.pages import PageSelector


class PageLists:
    """What is chosen of prompts, and where the engine has each page now.

    A list has the chosen pages of a prompt, for each layer and KV head, and after them
    the recent pages of what was written since. Its length is bounded by the budget and
    the recent window, whatever the context is: so is the cost of a draft.

    Attributes:
        selector: what chooses.
        are_cut: whether lists are cut to the longest of them, which waits for the
            device; else they have one length, as graphs need.
        spare_slot: a slot of no request, whose list is as long as any.
        max_pages: of a context, at most.
    """

    def __init__(
        self,
        selector: PageSelector,
        *,
        num_layers: int,
        num_kv_heads: int,
        num_slots: int,
        max_tokens: int,
        kv_budget: int,
        recent_window: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            max_tokens: of a context, at most.
            kv_budget: most tokens of a prompt that are seen.
            recent_window: tokens written since that are seen, in whole pages.
        """
        self.selector, self.spare_slot = selector, num_slots
        size = selector.page_size
        self.max_pages = -(-max_tokens // size)
        self._window = min(-(-recent_window // size), self.max_pages)
        self._most_chosen = max(selector.num_pages(kv_budget), -(-kv_budget // size))
        self._most_chosen = min(self._most_chosen, self.max_pages)
        if selector.keeps_all:
            self._most_chosen, self._window = 0, self.max_pages
        width = min(self._most_chosen + self._window, self.max_pages)
        rows = num_slots + 1
        self._places = torch.arange(width, device=device)
        self._blocks, self._num_chosen, self._prompt_pages = (
            torch.zeros(shape, dtype=torch.int64, device=device)
            for shape in ((rows, self.max_pages), rows, rows)
        )
        shape = (num_layers, rows, num_kv_heads, width if self._most_chosen else 0)
        self._chosen = torch.zeros(shape, dtype=torch.int64, device=device)
        self.are_cut = not is_gpu(device)
        self._num_chosen[-1] = self._prompt_pages[-1] = self._most_chosen

    @property
    def num_bytes(self) -> int:
        return self._blocks.nbytes + self._chosen.nbytes

    def choose(
        self,
        slot: int,
        blocks: Tensor,
        num_tokens: int,
        key_pages: list[Tensor],
        kv_budget: int,
    ) -> None:
        """Chooses of a prompt that is in the engine's cache.

        Args:
            blocks: [max_pages or more], where its pages are.
            num_tokens: of the prompt.
            key_pages: of each layer, [num_pages, P, G, D].
            kv_budget: of this request.
        """
        if self.selector.keeps_all:
            return
        num_pages = -(-num_tokens // self.selector.page_size)
        count = num_pages
        if num_tokens > kv_budget:
            for layer, pages in enumerate(key_pages):
                keys = pages[blocks[:num_pages]].flatten(0, 1)[:num_tokens]
                chosen = self.selector.select(keys.transpose(0, 1), kv_budget)
                count = chosen.shape[-1]
                self._chosen[layer, slot, :, :count] = chosen
        else:
            self._chosen[:, slot, :, :count] = self._places[:count]
        self._num_chosen[slot] = count
        self._prompt_pages[slot] = num_pages

    def place(self, slots: Tensor, blocks: Tensor) -> None:
        """Takes note where the engine has the pages of slots [B] now.

        Args:
            blocks: [B, max_pages or more].
        """
        blocks = blocks[:, : self.max_pages].to(torch.int64)
        self._blocks[slots, : blocks.shape[1]] = blocks

    def tables(self, slots: Tensor, ends: Tensor) -> tuple[list[Tensor], Tensor]:
        """The lists of slots [B], of contexts of ``ends`` [B] tokens.

        All pages of a list are full but the last one, where the context ends. A slot
        may stand there more than once, with other ends.

        Returns:
            Pages of each layer, [B, N] or [B, G, N] int64, and tokens in them, [B].
        """
        size, blocks = self.selector.page_size, self._blocks[slots]
        num_pages = (ends + (size - 1)) // size
        num_chosen, prompt_pages = self._num_chosen[slots], self._prompt_pages[slots]
        first = (num_pages - self._window).maximum(prompt_pages)
        listed = num_chosen + num_pages - first
        lengths = listed * size - (num_pages * size - ends)
        places = self._places
        if self.are_cut:
            places = places[: max(1, int(listed.max()))]
        recent = first[:, None] + places - num_chosen[:, None]
        recent = recent.clamp(0, self.max_pages - 1)
        num_layers, _, num_kv_heads, _ = self._chosen.shape
        if not self._most_chosen:
            return [blocks.gather(1, recent)] * num_layers, lengths
        is_chosen = (places < num_chosen[:, None])[:, None]
        chosen = self._chosen[:, slots, :, : len(places)]  # [L, B, G, N]
        order = torch.where(is_chosen, chosen, recent[:, None])
        blocks = blocks[:, None].expand(num_layers, -1, num_kv_heads, -1)
        return list(blocks.gather(-1, order)), lengths
