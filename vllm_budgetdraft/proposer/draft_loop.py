"""The draft loop: device work alone, of fixed shapes, so that a graph can hold it."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_budgetdraft.attention.paged import PagedAttention
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.truncation import truncated

#: Tokens that a decoder is fed in the first step of a draft. After a full acceptance
#: its cache lacks the last draft token and the bonus token; otherwise it lacks the
#: bonus token alone, and the token before it is computed again, to the same result.
FIRST_WIDTH = 2


class Drafts(NamedTuple):
    """What was drafted, valid until the next call.

    Attributes:
        tokens: [B, k] int64.
        confidences: [B, k] float32, the largest probability at each position; not
            finite where the drafter's logits were not.
        probabilities: [B, k, V] float32, what each token was drawn from; None where all
            were picked greedily, or what they were drawn from is in ``DrawnLogits``.
    """

    tokens: Tensor
    confidences: Tensor
    probabilities: Tensor | None


class Draws(NamedTuple):
    """How tokens are drawn.

    Attributes:
        temperatures: [B] float32, 0 where the likeliest token is to be picked.
        uniforms: [k, B] float32, of [0, 1).
        top_k: [B] int64, see ``truncated``; None where nothing is cut.
    """

    temperatures: Tensor
    uniforms: Tensor
    top_k: Tensor | None = None


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
            draws: whether drafts may be drawn, and not picked.
            drawn_logits: where to store what they are drawn from; if None, it is among
                the results, as probabilities.
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
        shape = (num_slots, max_drafts)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._confidences = torch.zeros(shape, device=device)
        self._probabilities: Tensor | None = None
        self._drawn_logits = drawn_logits
        if draws and drawn_logits is None:
            self._probabilities = torch.zeros(
                (*shape, drafter.config.vocab_size), device=device
            )
        self._page_mass: Tensor | None = None
        if counts_attention:
            num_tokens = max_width * num_slots
            self._page_mass = torch.zeros(
                (num_tokens, drafter.num_heads, cache.pages_per_slot), device=device
            )

    @property
    def num_bytes(self) -> int:
        """Of counts of attention and drafts' distributions."""
        buffers = [self._page_mass, self._probabilities]
        if self._drawn_logits is not None:
            buffers.append(self._drawn_logits.logits)
        return sum(x.nbytes for x in buffers if x is not None)

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
        drafts = self._tokens[:batch, :num_drafts]
        confidences = self._confidences[:batch, :num_drafts]
        draws, drawn_logits = inputs.draws, self._drawn_logits
        probabilities = None
        if draws is not None and self._probabilities is not None:
            probabilities = self._probabilities[:batch, :num_drafts]
        if draws is not None and drawn_logits is not None:
            drawn_logits.begin(slots)
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
            places = drafts[:, step], confidences[:, step]
            ids = self._drafter.draft_ids
            if draws is None:
                self._operations.greedy_pick(
                    logits, ids=ids, out=places, validate=validate
                )
            else:
                if draws.top_k is not None:
                    logits = truncated(logits, draws.top_k)
                drawn_from = None
                if drawn_logits is not None:
                    logits = drawn_logits.store(slots, step, logits)
                if probabilities is not None:
                    # What is never drafted remains at 0.
                    drawn_from = probabilities[:, step]
                    if ids is None:
                        drawn_from = drawn_from[:, : logits.shape[1]]
                self._operations.sampled_pick(
                    logits,
                    draws.temperatures,
                    draws.uniforms[step],
                    ids=ids,
                    out=(*places, drawn_from),
                    validate=validate,
                )
            fed, width = drafts[:, step], 1
        self._count(slots, attention)
        return Drafts(drafts, confidences, probabilities)

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
            page_mass=self._page_mass,
            validate=validate,
        )

    def _count(self, slots: Tensor, attention: PagedAttention) -> None:
        if attention.attention is not None:
            self._cache.add_attention(slots, attention.attention)


def _by_step(x: Tensor, width: int) -> list[Tensor]:
    """[B, T, ...] of all tokens fed, by step: [B * width, ...], then [B, ...]."""
    later = x[:, width:].transpose(0, 1).contiguous()
    return [x[:, :width].flatten(0, 1), *later]
