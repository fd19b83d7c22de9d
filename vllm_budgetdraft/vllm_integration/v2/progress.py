"""Requests of model runner V2, as far as the host knows them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.vllm_integration.remembering import Remembered


@dataclass
class Progress:
    """How far a request's draft cache is, as far as the host knows.

    How many drafts are accepted only the device knows, so that what a cache lacks is
    an upper bound here, and exact in ``OwnCacheSpeculator``.

    Attributes:
        num_prefill: tokens that it came with.
        is_greedy: whether vLLM looks at no logits of its drafts.
        num_to_read: first tokens of its context that are read, not fed with drafts.
        why_not: a reason of ``drafts_skipped`` for one that holds no slot.
        waits: whether it does so until there are pages.
        is_read: whether it has read.
        has_drafted: whether it did where it last sampled. Then the cache has all but
            what the next draft feeds.
        max_missing: most tokens that it lacks besides those, otherwise.
        is_cut: whether its drafts are drawn from a part of the vocabulary.
        num_waited: steps in which it sampled and had no drafts; None after the first.
        remembered: None where nothing is kept of it.
    """

    request_id: str
    num_prefill: int
    is_greedy: bool
    kv_budget: int | None = None
    why_not: str = ""
    waits: bool = False
    is_read: bool = False
    has_drafted: bool = False
    num_to_read: int = 0
    max_missing: int = 0
    is_cut: bool = False
    num_waited: int | None = 0
    remembered: Remembered | None = None

    def __post_init__(self) -> None:
        self.begin(self.num_prefill, has_sampled=False)

    @property
    def is_reading(self) -> bool:
        return not (self.why_not or self.is_read)

    def begin(self, num_tokens: int, *, has_sampled: bool) -> None:
        """Its draft cache is empty, and is to hold ``num_tokens`` tokens but the last.

        Args:
            has_sampled: whether the last of them is of this step. If not, one will come
                before the first draft, which is counted when it comes.
        """
        self.why_not = ""
        self.waits = self.is_read = self.has_drafted = False
        self.num_waited = 0
        self.num_to_read = num_tokens + (not has_sampled) - FIRST_WIDTH
        self.max_missing = 0 if has_sampled else -1

    def step(self, num_prefilled: int, num_drafts: int) -> bool:
        """Takes note of a step, and returns whether it sampled: see ``rows_of``."""
        has_sampled = num_prefilled >= self.num_prefill
        if has_sampled:
            self.max_missing += 1 + num_drafts
        return has_sampled


def rows_of(batch: Any) -> list[tuple[int, int, int]]:
    """Of each row of vLLM's InputBatch, what a step has done.

    Returns:
        Indices, prompt tokens that the target knows now, and drafts that it verified.
    """
    drafts = batch.num_draft_tokens_per_req
    if drafts is None:
        drafts = np.zeros_like(batch.num_scheduled_tokens)
    prefilled = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens
    columns = batch.idx_mapping_np, prefilled - drafts, drafts
    return list(zip(*(column.tolist() for column in columns), strict=True))
