"""Adaptive draft length where the scheduler decides: for model runner V2."""

import time
from typing import Any

from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.proposer.adaptive_length import AdaptiveLength
from vllm_budgetdraft.proposer.draft_length import doublings, scheduled_length
from vllm_budgetdraft.proposer.step_costs import StepCosts
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics

#: Steps that a length is kept, of which the last one is timed. What is scheduled now is
#: drafted at the step's end and verified in the next one; and the engine may schedule
#: one step before it waits for the last.
STEPS_PER_CHOICE = 4


class AdaptiveSchedule:
    """What a scheduler looks draft lengths up in, by the batch size.

    It stands where vLLM has its table for ``num_speculative_tokens_per_batch_size``,
    and chooses among lengths that vLLM captures graphs for, see ``every_length``. Until
    a worker has told what steps cost, a length is what it would be at most.
    """

    def __init__(
        self, scheduler: Any, config: BudgetDraftConfig, statistics: DraftStatistics
    ) -> None:
        self._scheduler = scheduler
        self._config = config
        self._adaptive: AdaptiveLength | None = None
        self._faults = FaultLog(statistics)
        self._last_batch: set[str] = set()
        self._length = 0
        self._num_left = 0

    def __getitem__(self, batch_size: int) -> int:
        """Draft length of the step that is being scheduled. Each look is a step."""
        try:
            self._length = self._next(batch_size)
        except Exception as error:
            self._faults.report("every request", error)
            self._length = 0
        return self._length

    def _next(self, batch_size: int) -> int:
        config, adaptive = self._config, self._adaptive
        running = self._scheduler.running
        longest = scheduled_length(
            config.num_speculative_tokens_per_batch_size,
            batch_size,
            config.num_speculative_tokens,
        )
        ids = [request.request_id for request in running]
        if adaptive is None or not ids:
            return longest
        now = time.perf_counter()
        is_decoding = all(
            request.num_computed_tokens >= request.num_prompt_tokens
            for request in running
        )
        if self._last_batch.isdisjoint(ids):  # nobody knows when the last step ended
            adaptive.forget_step()
            self._num_left = 0
        self._last_batch = set(ids)
        length = self._length
        if self._num_left:
            adaptive.restart_step(now, ids, is_decoding)
        else:
            self._num_left = STEPS_PER_CHOICE
            length = adaptive.choose(now, ids, is_decoding, longest)
        self._num_left -= 1
        adaptive.drafted(batch_size if length else 0, is_decoding)
        return length

    def use_costs(self, costs: StepCosts) -> None:
        """Begins to adapt lengths."""
        lengths = [0, *doublings(self._config.num_speculative_tokens)]
        self._adaptive = AdaptiveLength(costs, lengths)

    def record(self, drafts: dict[str, list[int]], sampled: dict[str, int]) -> None:
        """Learns from a step.

        Args:
            drafts: that were verified, by request id.
            sampled: number of tokens by request id.
        """
        if self._adaptive is not None:
            self._adaptive.acceptance.record(
                {
                    request_id: (len(tokens), sampled[request_id] - 1)
                    for request_id, tokens in drafts.items()
                    if tokens and sampled.get(request_id)
                }
            )


def every_length(longest: int) -> list[tuple[int, int, int]]:
    """A schedule that has all of ``AdaptiveSchedule``'s lengths somewhere.

    vLLM captures the graphs of verification for lengths that are in its schedule.
    """
    lengths = [longest, 0, *doublings(longest)[:-1]]
    return [(size, size, length) for size, length in enumerate(lengths, start=1)]
