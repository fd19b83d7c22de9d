"""Drafts picked from logits, into buffers that are allocated once."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.truncation import truncated


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


class Picker:
    """Picks the tokens of drafts, one place after the other.

    Nothing in it reads what the device computed, so that a graph can hold it.
    """

    def __init__(
        self,
        operations: ModuleType,
        *,
        num_slots: int,
        max_drafts: int,
        vocab_size: int,
        draws: bool,
        drawn_logits: DrawnLogits | None,
        draft_ids: Tensor | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            draws: whether tokens may be drawn, and not picked.
            drawn_logits: where to store what they are drawn from; if None, it is among
                the results, as probabilities.
            draft_ids: [n] int64, the token of each logit; None for the first tokens.
        """
        self._operations, self._draft_ids = operations, draft_ids
        self._drawn_logits = drawn_logits
        shape = (num_slots, max_drafts)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._confidences = torch.zeros(shape, device=device)
        self._probabilities: Tensor | None = None
        if draws and drawn_logits is None:
            self._probabilities = torch.zeros((*shape, vocab_size), device=device)

    @property
    def num_bytes(self) -> int:
        """Of what drafts are drawn from."""
        buffers = [self._probabilities]
        if self._drawn_logits is not None:
            buffers.append(self._drawn_logits.logits)
        return sum(x.nbytes for x in buffers if x is not None)

    def begin(self, slots: Tensor, num_drafts: int, draws: Draws | None) -> Drafts:
        """Where the drafts of slots [B] will be, once all places are picked."""
        rows = slice(len(slots)), slice(num_drafts)
        probabilities = None
        if draws is not None and self._probabilities is not None:
            probabilities = self._probabilities[rows]
        if draws is not None and self._drawn_logits is not None:
            self._drawn_logits.begin(slots)
        return Drafts(self._tokens[rows], self._confidences[rows], probabilities)

    def pick(
        self,
        drafts: Drafts,
        place: int,
        slots: Tensor,
        logits: Tensor,
        draws: Draws | None,
        *,
        validate: bool,
    ) -> Tensor:
        """Picks one token of every draft.

        Args:
            drafts: of ``begin``; written to.
            place: of k.
            slots: [B] int64.
            logits: [B, n], of ``draft_ids``.
            draws: None where the likeliest token is to be picked for all of them.

        Returns:
            [B] int64, those tokens.
        """
        tokens, ids = drafts.tokens[:, place], self._draft_ids
        places = tokens, drafts.confidences[:, place]
        if draws is None:
            self._operations.greedy_pick(logits, ids=ids, out=places, validate=validate)
            return tokens
        if draws.top_k is not None:
            logits = truncated(logits, draws.top_k)
        drawn_from = None
        if self._drawn_logits is not None:
            logits = self._drawn_logits.store(slots, place, logits)
        if drafts.probabilities is not None:
            # What is never drafted remains at 0.
            drawn_from = drafts.probabilities[:, place]
            if ids is None:
                drawn_from = drawn_from[:, : logits.shape[1]]
        self._operations.sampled_pick(
            logits,
            draws.temperatures,
            draws.uniforms[place],
            ids=ids,
            out=(*places, drawn_from),
            validate=validate,
        )
        return tokens
