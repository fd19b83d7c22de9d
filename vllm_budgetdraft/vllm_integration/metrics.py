"""What the proposer counts, for Prometheus.

It counts in vLLM's worker. Where that is another process than the one that answers
``/metrics``, numbers get there through the directory ``PROMETHEUS_MULTIPROC_DIR``.
"""

from prometheus_client import Counter, Gauge

FAULTS = Counter(
    "vllm_budgetdraft:draft_faults",
    "Failures in drafting, of which what they struck is generated without drafts; one "
    "for each step in which a request finds no room in the draft cache.",
    ["error"],
)
PAGES_IN_USE = Gauge(
    "vllm_budgetdraft:pages_in_use",
    "Pages of the draft cache that requests hold.",
    multiprocess_mode="mostrecent",
)
DRAFT_LENGTH = Gauge(
    "vllm_budgetdraft:draft_length",
    "Most tokens that a request might draft in the last step.",
    multiprocess_mode="mostrecent",
)
