"""What drafting did, counted where it happens, and on its way to whoever shows it."""

from collections import defaultdict
from typing import Any, Protocol

#: Of every metric's name in Prometheus.
PREFIX = "vllm_budgetdraft:"
#: Of ours among vLLM's statistics.
KEY = "budgetdraft"
#: Of vLLM's ModelRunnerOutput, what the worker took.
STATISTICS = "budgetdraft_statistics"
#: Of what a worker timed at start-up, among the statistics of its first step.
STEP_COSTS = "step_costs"

#: Name and meaning.
GAUGES = {
    "pages_in_use": "Pages of the draft cache that requests hold.",
    "pages_free": "Pages of the draft cache that no request holds.",
    "snapshot_bytes": "Of these, what holds snapshots of requests that are over.",
    "draft_length": "Most tokens that a request might draft in the last step.",
    "cuda_graphs": "CUDA graphs captured of drafts; 0 where drafts run eagerly.",
}
#: Shown with the suffix ``_total``.
COUNTERS = {
    "draft_steps": "Steps in which drafts were asked for.",
    "draft_seconds": "Seconds that drafting took, reading prompts for it included: of "
    "the device, where that is a GPU.",
    "evicted_tokens": "Context tokens that the draft cache dropped.",
    "snapshot_hits": "Requests that went on from a snapshot.",
    "snapshot_tokens": "Context tokens that the drafter need not read for that.",
    "snapshot_evictions": "Snapshots that made room for requests or others.",
}
#: The same by the values of a label: name, label, meaning.
LABELLED_COUNTERS = {
    "drafts_skipped": (
        "reason",
        "Times that a request sampled and had no drafts made after it. Reasons: "
        "reading (its prompt is not read yet), no_pages (the draft cache is full), off "
        "(it asked for none), draft_length (none pay now), max_model_len (it "
        "ends there), not_confident (draft_confidence_threshold), embeddings (its "
        "prompt has no tokens), failed (see draft_faults).",
    ),
    "tokens_to_read": (
        "cause",
        "Tokens of contexts that the drafter set out to read. Causes: prefill (the "
        "target computes them as well), computed (it had done so: they are in its "
        "prefix cache, or the request was preempted, or waited for pages).",
    ),
    "draft_faults": (
        "error",
        "Failures in drafting, of which what they struck is generated without drafts; "
        "one for each step in which a request finds no room in the draft cache.",
    ),
}
#: Name, bounds of buckets, and meaning.
HISTOGRAMS = {
    "steps_to_first_draft": (
        (0, 1, 2, 4, 8, 16, 32, 64),
        "Steps with drafts in which a request sampled and had none, from when it got "
        "pages of the draft cache, at first or anew, to its first drafts.",
    ),
}


class Waits(Protocol):
    """
    Attributes:
        num_waited: steps in which it sampled and had no drafts; None after the first
            drafts.
    """

    num_waited: int | None


class DraftStatistics:
    """Gauges, and counts since they were last taken."""

    def __init__(self) -> None:
        self._gauges: dict[str, float] = {}
        self._counts: defaultdict[tuple[str, str], float] = defaultdict(float)

    def set(self, name: str, value: float) -> None:
        assert name in GAUGES, name
        self._gauges[name] = value

    def count(self, name: str, amount: float = 1, label: str = "") -> None:
        """
        Args:
            label: of a histogram, the value that was seen.
        """
        known = {**LABELLED_COUNTERS, **HISTOGRAMS} if label else COUNTERS
        assert name in known, (name, label)
        assert amount >= 0, (name, amount)
        self._counts[name, label] += amount

    def count_reading(
        self, num_tokens: int, num_computed: int, num_known: int = 0
    ) -> None:
        """A context that is to be read.

        Args:
            num_computed: tokens of it that the target knew.
            num_known: that a snapshot knew, and that need not be read.
        """
        num_computed = min(num_tokens, max(num_known, num_computed))
        self.count("snapshot_hits", num_known > 0)
        self.count("snapshot_tokens", num_known)
        self.count("tokens_to_read", num_computed - num_known, "computed")
        self.count("tokens_to_read", num_tokens - num_computed, "prefill")

    def count_wait(self, request: Waits, has_drafts: bool) -> None:
        """A request sampled, and has drafts or waits for its first."""
        if request.num_waited is None:
            return
        if has_drafts:
            self.count("steps_to_first_draft", label=str(request.num_waited))
        request.num_waited = None if has_drafts else request.num_waited + 1

    def take(self) -> dict[str, Any]:
        """All there is, as plain dicts and lists; then begins anew."""
        counts = [[*key, amount] for key, amount in self._counts.items() if amount]
        taken = {"gauges": self._gauges, "counts": counts}
        self._gauges = {}
        self._counts.clear()
        return taken

    def add(self, taken: dict[str, Any]) -> None:
        """Adds what was taken elsewhere, later than what is here."""
        for name, value in taken["gauges"].items():
            self.set(name, value)
        for name, label, amount in taken["counts"]:
            self.count(name, amount, label)
