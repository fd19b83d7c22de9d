"""Requests of model runner V2, as far as the host knows them."""

from dataclasses import dataclass
from typing import Any

from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH


@dataclass
class Progress:
    """How far a request's draft cache is, as far as the host knows.

    How many drafts are accepted only the device knows, so that what a cache lacks is
    an upper bound here, and exact in ``runner_v2.BudgetDraftSpeculator``.

    Attributes:
        num_prefill: tokens that it came with, all but the last of which are read.
        why_not: a reason of ``drafts_skipped`` for one that holds no slot.
        is_read: whether they are.
        has_drafted: whether it did where it last sampled. Then the cache has all but
            what the next draft feeds.
        max_missing: most tokens that it lacks besides those, otherwise.
    """

    request_id: str
    num_prefill: int
    kv_budget: int | None = None
    why_not: str = ""
    is_read: bool = False
    has_drafted: bool = False
    max_missing: int = 1 - FIRST_WIDTH

    def step(self, batch: Any, row: int) -> tuple[int, bool]:
        """How many drafts were verified in this step, and whether it sampled.

        Args:
            batch: vLLM's InputBatch.
        """
        drafts = batch.num_draft_tokens_per_req
        num_drafts = 0 if drafts is None else int(drafts[row])
        num_prefilled = (
            batch.num_computed_prefill_tokens_np[row]
            + batch.num_scheduled_tokens[row]
            - num_drafts
        )
        return num_drafts, bool(num_prefilled >= self.num_prefill)
