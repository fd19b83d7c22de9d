"""Mask tokens that draft while the target verifies, in the same pass of its layers.

Letters in shapes: T verified tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_budgetdraft.flexdraft.mask_loop import MaskLoop
from vllm_budgetdraft.flexdraft.modeling import Attend, FlexDraft


class ParallelRound:
    """One group of mask tokens for each verified token, which it takes for the last.

    Which group is right is known when tokens are sampled; the others come to nothing.
    A group sees what the target's cache has up to its token, by the same list of pages
    as other drafts, and its own mask tokens; nobody sees a mask token of another group,
    and the target sees none at all. The number of mask tokens is a multiple of T, so
    that shapes are as fixed as the target's own.
    """

    def __init__(self, loop: MaskLoop, drafter: FlexDraft) -> None:
        self._loop, self._drafter = loop, drafter
        self._attend: Attend | None = None
        self._masks: Tensor

    @property
    def is_on(self) -> bool:
        """Whether mask tokens are on their way."""
        return self._attend is not None

    def begin(self, slots: Tensor, positions: Tensor) -> None:
        """Has mask tokens enter the next pass.

        Args:
            slots: [T], of each verified token.
            positions: [T], where it stands. Its keys and values must be in the cache
                when ``pass_mlp`` is called.
        """
        drafter = self._drafter
        self._attend = self._loop.attention(slots, positions + 1, validate=False)
        unknown = drafter.unknown_bonus(len(slots))
        self._masks = drafter.masks(unknown, self._loop.block).flatten(0, 1)

    def pass_mlp(
        self, index: int, tokens: Tensor, mlp: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The MLP of a layer over the target's tokens, and the layer over mask tokens.

        Args:
            index: of the layers that mask tokens go through.
            tokens: [T or more, hidden_size], what the MLP is given.
            mlp: one product for all of them, so that its weights are read once.

        Returns:
            What it makes of ``tokens``.
        """
        assert self._attend is not None
        layer = self._loop.parts.layers[index]
        masks = self._drafter.attended(index, self._masks, layer, self._attend)
        both = torch.cat([tokens, layer.post_attention_layernorm(masks)])
        both = mlp(both)
        self._masks = masks + both[len(tokens) :]
        return both[: len(tokens)]

    def end(self, rows: Tensor, num_drafts: int) -> Tensor:
        """States of the groups that were right, normed, [B, num_drafts, hidden_size].

        Args:
            rows: [B], of T, the last accepted token of each request.
        """
        self._attend = None
        masks = self._masks.unflatten(0, (-1, self._loop.block))
        hidden = masks[rows, 1 : num_drafts + 1]
        normed: Tensor = self._loop.parts.norm(hidden.flatten(0, 1))
        return normed.view_as(hidden)

    def cancel(self) -> None:
        """Forgets mask tokens that nobody wants."""
        self._attend = None
