"""What fails in drafting costs drafts, and is said sparingly."""

import logging

from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics

# Under vLLM's own logger, the only one that it configures.
logger = logging.getLogger("vllm.budgetdraft")


#: Failures of no request in particular, without a draft between them, after which the
#: requests that draft do so no more: each may cost them all that they have read.
MOST_IN_A_ROW = 3


class FaultLog:
    """Counts failures, and logs the 1st, 2nd, 4th, 8th and so on.

    Attributes:
        num_faults: failures so far.
    """

    def __init__(self, statistics: DraftStatistics) -> None:
        self.num_faults = self._num_in_row = 0
        self._statistics = statistics

    def report_every(self, error: Exception) -> bool:
        """A failure of no request in particular.

        Returns:
            Whether it was one too many, and all requests of now are to give up.
        """
        self.report("every request", error)
        self._num_in_row += 1
        return self._num_in_row >= MOST_IN_A_ROW

    def drafted(self) -> None:
        """Something was drafted."""
        self._num_in_row = 0

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
                "on",
                whose,
                self.num_faults,
                type(error).__name__,
                error,
                exc_info=error,
            )
