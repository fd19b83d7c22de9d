"""Drafts as model runner V2 takes them: of every row, and with what is told of them."""

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_budgetdraft.proposer.draft_length import confident_lengths
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.picking import Drafts


class DraftOutput:
    """What vLLM takes: tokens by row, and logits by slot.

    vLLM reads logits of the requests that it samples at a temperature, and divides by
    it. It takes drafts of every row; one that did not draft repeats its last token,
    "drawn" with the probability 1, which is as lossless as any draft.

    Attributes:
        logits: see ``DrawnLogits``; None where no draft is drawn.
    """

    def __init__(
        self,
        num_slots: int,
        num_drafts: int,
        drawn_logits: DrawnLogits | None,
        device: torch.device,
        threshold: float = 0.0,
    ) -> None:
        """
        Args:
            threshold: see ``confident_lengths``; 0 for none.
        """
        self._threshold = threshold
        self._lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)
        shape = (num_slots, num_drafts)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._drawn_logits = drawn_logits
        self.logits = None if drawn_logits is None else drawn_logits.logits

    def confident_lengths(self, num_rows: int) -> list[int] | None:
        """How many drafts of the first rows are worth verifying, if there is a limit.

        For rows that drafted; others have any number. Waits for the device.
        """
        if not self._threshold:
            return None
        lengths: list[int] = self._lengths[:num_rows].tolist()
        return lengths

    def rows(self, num_rows: int) -> Tensor:
        """[num_rows, k] int64, the first."""
        return self._tokens[:num_rows]

    def repeat(self, slots: Tensor, last_tokens: Tensor, is_told: bool = True) -> None:
        """Has the first rows [B] draft their last tokens [B, 1], for certain.

        Args:
            is_told: whether vLLM will look at logits of theirs.
        """
        tokens = self.rows(len(slots))
        tokens[:] = last_tokens
        if is_told and self._drawn_logits is not None:
            self._drawn_logits.store_certain(slots, tokens)

    def fill(
        self,
        rows: Tensor | slice,
        slots: Tensor,
        drafted: Drafts,
        last_tokens: Tensor,
        temperatures: Tensor | None,
    ) -> None:
        """Takes what rows drafted, and the last token where logits are not finite.

        Args:
            last_tokens: [B, 1].
            temperatures: [B], what was drafted at; 0 where the likeliest was picked,
                whatever the target samples at. None if vLLM will look at no logits.
        """
        if self._threshold:
            confidences = drafted.confidences
            self._lengths[rows] = confident_lengths(confidences, self._threshold)
        is_sound = drafted.confidences.isfinite()
        tokens = torch.where(is_sound, drafted.tokens, last_tokens)
        self._tokens[rows, : tokens.shape[1]] = tokens
        if self._drawn_logits is not None and temperatures is not None:
            is_certain = ~is_sound | (temperatures == 0)[:, None]
            self._drawn_logits.make_certain(slots, tokens, is_certain)

    def share(self, slots: Tensor, are_verified: bool = True) -> None:
        """The leader's drafts of the first rows [B], on every rank.

        Each rank verifies them by itself: with other probabilities, ranks would accept
        other tokens and no longer compute the same model.

        Args:
            are_verified: whether any will be; every rank must say the same.
        """
        group, tokens = get_tp_group(), self.rows(len(slots))
        tokens[:] = group.broadcast(tokens.clone(), src=0)
        if self.logits is not None and are_verified:
            self.logits[slots] = group.broadcast(self.logits[slots], src=0)
