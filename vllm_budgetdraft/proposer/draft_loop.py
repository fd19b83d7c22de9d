"""The draft loop: device work alone, of fixed shapes, so that a graph can hold it."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_budgetdraft.attention.paged import PagedAttention
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.picking import Drafts, Draws, Picker

#: Tokens that a decoder is fed in the first step of a draft. After a full acceptance
#: its cache lacks the last draft token and the bonus token; otherwise it lacks the
#: bonus token alone, and the token before it is computed again, to the same result.
FIRST_WIDTH = 2


class DraftInputs(NamedTuple):
    """What a draft starts from.

    Attributes:
        slots: [B] int64, distinct but for the spare one.
        ends: [B] int64, context lengths.
        tokens: [B, W] int64, the last tokens of each context.
        draws: None where the likeliest token is to be picked for all of them.
        fed: see ``Fed``; None for a decoder, whose W tokens are all of the context.
    """

    slots: Tensor
    ends: Tensor
    tokens: Tensor
    draws: Draws | None
    fed: "Fed | None" = None


class Fed(NamedTuple):
    """What a drafter that reads features is fed beside tokens.

    Attributes:
        features: [B, W, hidden_size], of each token.
        counts: [B] int64, how many of W are of the context, from 1 on: the first ones.
            What is fed after them is overwritten by drafts.
    """

    features: Tensor
    counts: Tensor


class DraftLoop:
    """Feeds tokens through the drafter, over the pages of their slots.

    Nothing in it reads what the device computed, and which operations run depends on
    shapes alone: between two tokens there is no host, and a graph of one run serves
    every other run of its shapes. Results lie in buffers that are allocated once.
    """

    def __init__(
        self,
        drafter: Drafter,
        cache: BudgetedCache,
        operations: ModuleType,
        *,
        is_relative: bool,
        max_drafts: int,
        max_width: int,
        draws: bool,
        drawn_logits: DrawnLogits | None,
        counts_attention: bool,
    ) -> None:
        """
        Args:
            is_relative: whether positions are cache indices, see ``position_mode``.
            max_width: most tokens of a request that ``append`` takes, at least
                ``FIRST_WIDTH``.
            draws, drawn_logits: see ``Picker``.
            counts_attention: whether the cache evicts by it.
        """
        self._drafter = drafter
        self._cache = cache
        self._operations = operations
        self._is_relative = is_relative
        device, num_slots = cache.num_evicted.device, cache.num_slots
        widths = range(-FIRST_WIDTH, max(max_drafts, max_width))
        self._offsets = torch.tensor(widths, device=device)
        starts = torch.arange(num_slots + 1, device=device)
        self._query_starts = {
            width: starts * width for width in range(1, max_width + 1)
        }
        self._picker = Picker(
            operations,
            num_slots=num_slots,
            max_drafts=max_drafts,
            vocab_size=drafter.config.vocab_size,
            draws=draws,
            drawn_logits=drawn_logits,
            draft_ids=drafter.draft_ids,
            device=device,
        )
        self._page_attention: Tensor | None = None
        if counts_attention:
            num_tokens = max_width * num_slots
            self._page_attention = torch.zeros(
                (num_tokens, drafter.num_heads, cache.pages_per_slot), device=device
            )

    @property
    def num_bytes(self) -> int:
        """Of counts of attention and drafts' distributions."""
        counted = self._page_attention
        return self._picker.num_bytes + (0 if counted is None else counted.nbytes)

    def append(
        self,
        slots: Tensor,
        tokens: Tensor,
        starts: Tensor,
        features: Tensor | None,
        *,
        validate: bool,
    ) -> None:
        """See ``DraftProposer.append``."""
        width = tokens.shape[1]
        self._cache.make_room(slots, starts + width)
        offsets = self._offsets[FIRST_WIDTH : FIRST_WIDTH + width]
        rotary, cells, lengths = self._places(slots, starts[:, None] + offsets)
        attention = self._attention(slots, validate)
        query_starts = self._query_starts[width][: len(slots) + 1]
        cos, sin = (x.flatten(0, 1) for x in rotary)
        self._drafter.step(
            tokens.flatten(),
            None if features is None else features.flatten(0, 1),
            attention.step(
                (cos, sin),
                cells.flatten(),
                lengths[:, -1].contiguous(),
                query_starts,
                width,
            ),
        )
        self._count(slots, attention)

    def draft(self, inputs: DraftInputs, num_drafts: int, *, validate: bool) -> Drafts:
        """A first step of several tokens, then single ones.

        Rejected drafts of the last call need no undoing: they lie behind the context's
        end, where this one writes.
        """
        slots = inputs.slots
        batch, width = inputs.tokens.shape
        positions, top = self._positions(inputs, num_drafts)
        self._cache.make_room(slots, top)
        (cos, sin), cells, lengths = self._places(slots, positions)
        steps = zip(
            zip(_by_step(cos, width), _by_step(sin, width), strict=True),
            _by_step(cells, width),
            lengths[:, width - 1 :].T.contiguous(),
            strict=True,
        )
        attention = self._attention(slots, validate)
        drafts = self._picker.begin(slots, num_drafts, inputs.draws)
        fed, features = inputs.tokens.flatten(), None
        last: slice | Tensor = slice(width - 1, None, width)  # of each request
        if inputs.fed is not None:
            features = inputs.fed.features.flatten(0, 1)
            last = self._query_starts[width][:batch] + inputs.fed.counts - 1
        for step, (rotary, step_cells, step_lengths) in enumerate(steps):
            starts = self._query_starts[width][: batch + 1]
            attend = attention.step(rotary, step_cells, step_lengths, starts, width)
            hidden, features = self._drafter.step(fed, features, attend)
            if width > 1:
                hidden = hidden[last]
                features = None if features is None else features[last]
            logits = self._drafter.logits(hidden)
            picked = self._picker.pick(
                drafts, step, slots, logits, inputs.draws, validate=validate
            )
            fed, width = picked, 1
        self._count(slots, attention)
        return drafts

    def _positions(self, inputs: DraftInputs, num_drafts: int) -> tuple[Tensor, Tensor]:
        """Of each token fed, [B, W + num_drafts - 1], and what all are below, [B].

        The last draft token is not fed.
        """
        ends, top = inputs.ends, inputs.ends + (num_drafts - 1)
        if inputs.fed is None:
            offsets = self._offsets[: FIRST_WIDTH + num_drafts - 1]
            return ends[:, None] + offsets, top
        starts, width = ends - inputs.fed.counts, inputs.tokens.shape[1]
        offsets = self._offsets[FIRST_WIDTH:]
        first = starts[:, None] + offsets[:width]
        later = ends[:, None] + offsets[: num_drafts - 1]
        return torch.cat([first, later], 1), top.maximum(starts + width)

    def _places(
        self, slots: Tensor, positions: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Of positions [B, T]: cos and sin [B, T, D], cells, and lengths with them."""
        cache = self._cache
        indices = positions - cache.num_evicted[slots, None]
        rotary = self._drafter.rotary(indices if self._is_relative else positions)
        cells = cache.page_table.cells(slots, indices, cache.page_size)
        return rotary, cells, indices + 1

    def _attention(self, slots: Tensor, validate: bool) -> PagedAttention:
        return PagedAttention(
            self._operations,
            self._cache.pool,
            self._cache.page_table.pages[slots],
            key_rotary=self._drafter.rotary_rows if self._is_relative else None,
            page_attention=self._page_attention,
            validate=validate,
        )

    def _count(self, slots: Tensor, attention: PagedAttention) -> None:
        if attention.received is not None:
            self._cache.add_attention(slots, attention.received)


def _by_step(x: Tensor, width: int) -> list[Tensor]:
    """[B, T, ...] of all tokens fed, by step: [B * width, ...], then [B, ...]."""
    later = x[:, width:].transpose(0, 1).contiguous()
    return [x[:, :width].flatten(0, 1), *later]
