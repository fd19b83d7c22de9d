"""What fails in drafting costs drafts, and is said sparingly."""

import logging

from vllm_budgetdraft.vllm_integration.statistics import DraftStatistics

# Under vLLM's own logger, the only one that it configures.
logger = logging.getLogger("vllm.budgetdraft")


class FaultLog:
    """Counts failures, and logs the 1st, 2nd, 4th, 8th and so on.

    Attributes:
        num_faults: failures so far.
    """

    def __init__(self, statistics: DraftStatistics) -> None:
        self.num_faults = 0
        self._statistics = statistics

    def report(self, whose: str, error: Exception) -> None:
        """
        Args:
            whose: the requests that draft nothing because of it.
        """
        self.num_faults += 1
        self._statistics.count("draft_faults", label=type(error).__name__)
        if self.num_faults & (self.num_faults - 1) == 0:
            logger.error(
                "drafting failed for %s (%d failures so far): %s: %s; generation goes "
                "on without drafts",
                whose,
                self.num_faults,
                type(error).__name__,
                error,
                exc_info=error,
            )
