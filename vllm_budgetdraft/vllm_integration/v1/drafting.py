"""Requests of a batch, and what drafts for them: with a cache of its own or without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from vllm_budgetdraft.config import RequestSettings
from vllm_budgetdraft.vllm_integration.metrics.observation import DraftTimer
from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics


@dataclass(frozen=True)
class Request:
    """A row of the batch that is to be drafted for.

    Attributes:
        state: vLLM's object for the request.
        context: token ids, prompt and output.
        sampled: whether it sampled a token in this step; if not, its prompt is still
            being prefilled.
        max_drafts: most tokens to draft now; 0 if it keeps its cache, and no more.
        num_computed: tokens of the context that the target knew before this step.
        num_scheduled: tokens that it computed in this step, drafts among them.
        first_state: row of the first of them, among all that the step computed.
        num_accepted: drafts that were accepted in this step.
        block_tables: of each kind of the target's cache, where its pages are.
    """

    row: int
    request_id: str
    state: Any
    context: np.ndarray
    sampled: bool
    max_drafts: int
    num_computed: int = 0
    block_tables: tuple[np.ndarray, ...] = ()
    num_scheduled: int = 0
    first_state: int = 0
    num_accepted: int = 0


class Drafting(Protocol):
    """Drafts for the requests of a batch.

    Attributes:
        statistics: of drafting, to be taken by whoever sends them on.
        timer: to be run while it drafts.
        probabilities: of the last drafts, request ids and [len(ids), k, V] float32;
            None if no draft was drawn.
        has_only_drafted: whether every request that may draft just did, and none had
            to read for it.
    """

    statistics: DraftStatistics
    timer: DraftTimer
    probabilities: tuple[list[str], Tensor] | None
    has_only_drafted: bool

    def warm_up(self) -> None:
        """Takes the memory that drafting will take, where vLLM measures that."""

    def draft(
        self, requests: list[Request], is_trial: bool = False
    ) -> dict[int, list[int]]:
        """Drafts by row, of the rows that are ready and do not fail.

        Args:
            is_trial: whether it will do if some draft: nobody else reads then.
        """

    def forget_ended(self, live: Mapping[str, Any]) -> None:
        """Forgets requests that are over, or another one of the same id by now."""

    def reset(self, error: Exception) -> None:
        """Has every request begin anew after a failure of none in particular.

        After several in a row they draft no more, see ``FaultLog.report_every``.
        """

    def observe(self) -> None:
        """Notes what there is now, and what drafting took."""


def max_drafts(request: Request, settings: RequestSettings) -> int:
    """Most tokens to draft now for a request that asked for such settings."""
    asked = settings.num_speculative_tokens
    return request.max_drafts if asked is None else min(asked, request.max_drafts)
