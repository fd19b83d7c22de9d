"""Adaptive draft length where the scheduler decides: for model runner V2."""

import time
from typing import Any

from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.proposer.adaptive_length import AdaptiveLength
from vllm_budgetdraft.proposer.draft_length import ladder, scheduled_length
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.patches.statistics import statistics_of

#: Steps that a length is kept, of which the last one is timed. What is scheduled now is
#: drafted at the step's end and verified in the next one; and the engine may schedule
#: one step before it waits for the last.
STEPS_PER_CHOICE = 4


class AdaptiveSchedule:
    """What a scheduler looks draft lengths up in, by the batch size.

    It stands where vLLM has its table for ``num_speculative_tokens_per_batch_size``,
    and chooses among lengths that vLLM captures graphs for, see ``every_length``.
    """

    def __init__(self, scheduler: Any, config: BudgetDraftConfig) -> None:
        longest = config.num_speculative_tokens
        self._scheduler = scheduler
        self._config = config
        self._adaptive = AdaptiveLength(longest, [0, *ladder(longest)])
        self._faults = FaultLog(statistics_of(scheduler))
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
        now, batch = time.perf_counter(), self._batch()
        ids = {request.request_id for request in self._scheduler.running}
        if self._last_batch.isdisjoint(ids):  # nobody knows when the last step ended
            adaptive.forget_step()
            self._num_left = 0
        self._last_batch = ids
        length = self._length
        if self._num_left:
            adaptive.restart_step(now, batch)
        else:
            self._num_left = STEPS_PER_CHOICE
            length = adaptive.choose(
                now,
                batch,
                batch_size,
                scheduled_length(
                    config.num_speculative_tokens_per_batch_size,
                    batch_size,
                    config.num_speculative_tokens,
                ),
            )
        self._num_left -= 1
        adaptive.drafted(batch_size if length else 0, batch is not None)
        return length

    def record(self, drafts: dict[str, list[int]], sampled: dict[str, int]) -> None:
        """Learns from a step.

        Args:
            drafts: that were verified, by request id.
            sampled: number of tokens by request id.
        """
        self._adaptive.acceptance.record(
            [
                (len(tokens), sampled[request_id] - 1)
                for request_id, tokens in drafts.items()
                if tokens and sampled.get(request_id)
            ]
        )

    def _batch(self) -> tuple[str, ...] | None:
        """Requests that decode together; None if one is still being prefilled."""
        running = self._scheduler.running
        if any(r.num_computed_tokens < r.num_prompt_tokens for r in running):
            return None
        return tuple(request.request_id for request in running)


def every_length(longest: int) -> list[tuple[int, int, int]]:
    """A schedule that has all of ``AdaptiveSchedule``'s lengths somewhere.

    vLLM captures the graphs of verification for lengths that are in its schedule.
    """
    lengths = [longest, 0, *ladder(longest)[:-1]]
    return [(size, size, length) for size, length in enumerate(lengths, start=1)]
