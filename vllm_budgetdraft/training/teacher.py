"""What the target says of a continuation: asked now, or stored when it wrote it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.objectives import IGNORED

#: Temperature that stands for 0, where p is all on the likeliest token.
NEARLY_GREEDY = 1e-4
#: Settings by which a model changes its logits after the output matrix.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Teacher(Protocol):
    """The target's distribution p at N positions, taken in pieces."""

    @property
    def temperatures(self) -> Tensor | None:
        """[N] float32, of p; None is 1 everywhere."""

    def labels(self, rows: slice) -> Tensor:
        """Likeliest tokens, [n] int64; ``IGNORED`` where unknown."""

    def compare(self, rows: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """What to compare of q and p, over the same events.

        Args:
            log_q: [V, n, vocab_size], of V views.

        Returns:
            [V, n, events] and [n, events].
        """


class LiveTeacher:
    """Logits of hidden states, computed where they are wanted and not kept."""

    def __init__(
        self, hidden: Tensor, head: nn.Linear, temperatures: Tensor | None = None
    ) -> None:
        """
        Args:
            hidden: [N, hidden_size], the target's.
            head: its output matrix.
        """
        self._hidden, self._head = hidden, head
        self.temperatures = temperatures
        self._piece: tuple[slice, Tensor] | None = None

    def labels(self, rows: slice) -> Tensor:
        return self._log_probs(rows).argmax(-1)

    def compare(self, rows: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return log_q, self._log_probs(rows)

    @torch.no_grad()
    def _log_probs(self, rows: slice) -> Tensor:
        if self._piece is None or self._piece[0] != rows:
            logits = self._head(self._hidden[rows]).float()
            if self.temperatures is not None:
                logits = logits / _positive(self.temperatures[rows])
            self._piece = rows, logits.log_softmax(-1)
        return self._piece[1]


@dataclass(frozen=True)
class StoredTeacher:
    """The n likeliest tokens as they were stored.

    Attributes:
        next_tokens: [N] int64, what the target wrote; ``IGNORED`` where it did not.
        top_ids: [N, n] int64, the likeliest first; None if only tokens were stored.
        top_log_probs: [N, n] float32, at temperature 1.
        temperatures: see ``Teacher``.
    """

    next_tokens: Tensor
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    temperatures: Tensor | None = None

    def labels(self, rows: slice) -> Tensor:
        written = self.next_tokens[rows]
        if self.top_ids is None:
            return written
        return self.top_ids[rows, 0].where(written != IGNORED, IGNORED)

    def compare(self, rows: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        assert self.top_ids is not None and self.top_log_probs is not None
        ids = self.top_ids[rows].expand(*log_q.shape[:-1], -1)
        log_p = self.top_log_probs[rows]
        if self.temperatures is not None:
            log_p = _top_at(log_p, _positive(self.temperatures[rows]))
        return log_q.gather(-1, ids), log_p


def _positive(temperatures: Tensor) -> Tensor:
    """[n, 1], for rows to be divided by."""
    return temperatures.clamp_min(NEARLY_GREEDY)[:, None]


def _top_at(log_p: Tensor, temperatures: Tensor) -> Tensor:
    """Likeliest tokens [n, k] at temperatures [n, 1]; the others as likely as the last.

    So they are at most, and at temperature 1 nothing changes.
    """
    power = 1 / temperatures
    others = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    last = log_p[:, -1:]
    # If the last one cannot be, no other can.
    others = (others + last * (power - 1)).where(last.isfinite(), -torch.inf)
    sharp = torch.cat([log_p * power, others], -1)
    return sharp.log_softmax(-1)[:, :-1]


@torch.no_grad()
def last_hidden(target: PreTrainedModel, tokens: Tensor, count: int) -> Tensor:
    """Hidden states of the last positions of contexts [B, T]: [B, count, size]."""
    hidden: Tensor = target.base_model(tokens, use_cache=False).last_hidden_state
    return hidden[:, -count:]


def check_target(target: PreTrainedModel) -> None:
    """Raises ConfigurationError for one whose logits are not its output matrix's."""
    for key in LOGIT_TRANSFORMS:
        value = getattr(target.config, key, None)
        if value not in (None, 1.0):
            raise ConfigurationError(
                f"the target's {key}={value} changes its logits, which training from "
                "a live target does not follow; train on stored continuations with "
                "top_logprobs (budgetdraft generate)"
            )
