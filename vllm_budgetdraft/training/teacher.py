"""What the target says of a continuation: asked now, or stored when it wrote it."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.draft_vocabulary import DraftVocabulary
from vllm_budgetdraft.training.objectives import IGNORED, OUTSIDE

#: Temperature that stands for 0, where p is all on the likeliest token.
NEARLY_GREEDY = 1e-4
#: Settings by which a model changes its logits after the output matrix.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Comparison(NamedTuple):
    """What to compare of q and p, over the same events.

    Attributes:
        log_q: [V, n, events], of V views.
        log_p: [n, events], -inf of tokens that are not drafted.
        share: [n], of p that is, or may be, on the draft vocabulary: all but what is
            known to be elsewhere; None where the whole vocabulary is drafted.
    """

    log_q: Tensor
    log_p: Tensor
    share: Tensor | None


class Teacher(Protocol):
    """The target's distribution p at N positions, taken in pieces.

    Logits are of the tokens of a draft vocabulary, or of all of them.
    """

    @property
    def temperatures(self) -> Tensor | None:
        """[N] float32, of p; None is 1 everywhere."""

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """What is drafted; None is all tokens."""

    def labels(self, rows: slice) -> Tensor:
        """Places of the likeliest tokens' logits, [n] int64.

        ``IGNORED`` where the token is unknown, ``OUTSIDE`` where it is not drafted.
        """

    def compare(self, rows: slice, log_q: Tensor) -> Comparison:
        """
        Args:
            log_q: [V, n, number of logits], of V views.
        """


class LiveTeacher:
    """Logits of hidden states, computed where they are wanted and not kept."""

    def __init__(
        self,
        hidden: Tensor,
        head: nn.Linear,
        temperatures: Tensor | None = None,
        vocabulary: DraftVocabulary | None = None,
    ) -> None:
        """
        Args:
            hidden: [N, hidden_size], the target's.
            head: its output matrix.
        """
        self._hidden, self._head = hidden, head
        self.temperatures, self.vocabulary = temperatures, vocabulary
        self._piece: tuple[slice, Tensor] | None = None

    def labels(self, rows: slice) -> Tensor:
        tokens = self._log_probs(rows).argmax(-1)
        return self.vocabulary.labels(tokens) if self.vocabulary else tokens

    def compare(self, rows: slice, log_q: Tensor) -> Comparison:
        log_p = self._log_probs(rows)
        if self.vocabulary is None:
            return Comparison(log_q, log_p, None)
        log_p = log_p.index_select(-1, self.vocabulary.ids)
        return Comparison(log_q, log_p, log_p.exp().sum(-1))

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
        temperatures, vocabulary: see ``Teacher``.
    """

    next_tokens: Tensor
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    temperatures: Tensor | None = None
    vocabulary: DraftVocabulary | None = None

    def labels(self, rows: slice) -> Tensor:
        tokens = self.next_tokens[rows]
        if self.top_ids is not None:
            tokens = self.top_ids[rows, 0].where(tokens != IGNORED, IGNORED)
        return self.vocabulary.labels(tokens) if self.vocabulary else tokens

    def compare(self, rows: slice, log_q: Tensor) -> Comparison:
        assert self.top_ids is not None and self.top_log_probs is not None
        places, log_p = self.top_ids[rows], self.top_log_probs[rows]
        if self.temperatures is not None:
            log_p = _top_at(log_p, _positive(self.temperatures[rows]))
        share: Tensor | None = None
        if self.vocabulary is not None:
            places = self.vocabulary.labels(places)
            is_drafted = places != OUTSIDE
            # What is unknown may be drafted: KL leaves it where it was.
            share = 1 - log_p.exp().where(~is_drafted, 0).sum(-1)
            # Of another token's q, which min(p, q) = 0 leaves without a gradient.
            places = places.clamp_min(0)
            log_p = log_p.where(is_drafted, -torch.inf)
        log_q = log_q.gather(-1, places.expand(*log_q.shape[:-1], -1))
        return Comparison(log_q, log_p, share)


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
