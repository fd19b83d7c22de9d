"""What fails in drafting costs drafts, and is said sparingly."""

import logging

from vllm_budgetdraft.vllm_integration import metrics

# Under vLLM's own logger, the only one that it configures.
logger = logging.getLogger("vllm.budgetdraft")


class FaultLog:
    """Counts failures, and logs the 1st, 2nd, 4th, 8th and so on.

    Attributes:
        num_faults: failures so far.
    """

    def __init__(self) -> None:
        self.num_faults = 0

    def report(self, whose: str, error: Exception) -> None:
        """
        Args:
            whose: the requests that draft nothing because of it.
        """
        self.num_faults += 1
        metrics.FAULTS.labels(error=type(error).__name__).inc()
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
