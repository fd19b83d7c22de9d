"""Every setting, declared once: JSON keys, command line and README share this list."""

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_budgetdraft.errors import ConfigurationError

BUILT_IN_POLICIES = (
    "chunk_retrieval",
    "observation_window",
    "sink_window",
    "keep_all",
)


class EvictionSettings(BaseModel):
    """What an eviction policy needs to know; training and serving share it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    eviction_policy: str = Field(
        "chunk_retrieval",
        description="Which positions the draft cache keeps: chunk_retrieval, "
        "observation_window, sink_window, keep_all, or your own class as "
        "'package.module:Class'.",
    )
    sink_tokens: int = Field(
        8, ge=0, description="First tokens of the prompt that are always kept."
    )
    local_tokens: int = Field(
        256,
        ge=0,
        description="Last tokens of the prompt that chunk_retrieval always keeps; at "
        "most half of the budget that the sinks leave. 0 is the paper's selection.",
    )
    chunk_size: int = Field(
        8, ge=1, description="Tokens per chunk that chunk_retrieval keeps or drops."
    )
    chunk_score: Literal["last_key", "last_queries"] = Field(
        "last_key",
        description="How chunk_retrieval scores a chunk: last key of the prompt "
        "against the chunk's mean key, or attention of the last queries.",
    )
    observation_tokens: int = Field(
        16,
        ge=1,
        description="Last prompt queries used by chunk_score=last_queries and by "
        "observation_window, which also keeps their tokens.",
    )
    pooling_size: int = Field(
        5,
        ge=1,
        description="Neighbours, an odd number, over which observation_window averages "
        "attention.",
    )

    @model_validator(mode="after")
    def _policy_is_known(self) -> Self:
        name = self.eviction_policy
        if name not in BUILT_IN_POLICIES and ":" not in name:
            raise ValueError(
                f"eviction_policy={name!r} is unknown; use one of "
                f"{', '.join(BUILT_IN_POLICIES)}, or 'package.module:Class'"
            )
        return self

    @field_validator("pooling_size")
    @classmethod
    def _has_a_middle(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError(f"{size} is even; use {size - 1} or {size + 1}")
        return size

    @property
    def min_budget(self) -> int:
        """Smallest budget in tokens that these settings can work with."""
        if self.eviction_policy == "chunk_retrieval":
            # The paper's sink is the first chunk, whole.
            return -(-self.sink_tokens // self.chunk_size) * self.chunk_size + (
                self.chunk_size
            )
        return self.sink_tokens + self.chunk_size


class BudgetDraftConfig(EvictionSettings):
    """The settings of ``--speculative-config '{"method": "budgetdraft", ...}'``."""

    model: str = Field(description="Folder of the drafter (Hugging Face layout).")
    num_speculative_tokens: int = Field(
        ge=1, le=128, description="Tokens drafted per step."
    )
    kv_budget: int = Field(
        512,
        ge=1,
        description="Prompt tokens that the drafter's cache keeps per request. "
        "Unused by keep_all, which keeps every token.",
    )
    recent_window: int = Field(
        256,
        ge=1,
        description="Generated tokens that the drafter's cache keeps per request "
        "beside the budget.",
    )
    page_size: int = Field(16, ge=1, description="Tokens per page of the draft cache.")
    draft_prefill: Literal["full", "streaming"] = Field(
        "full",
        description="How the drafter reads a prompt: in full, keeping the budget in "
        "the end, or streaming, keeping the budget after every chunk, so that time is "
        "linear in the prompt and memory does not depend on it.",
    )
    draft_prefill_chunk: int = Field(
        4096,
        ge=1,
        description="Prompt tokens that the drafter reads per engine step, of all "
        "requests together.",
    )
    attention_backend: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="What the drafter's attention and cache operations run on; auto is "
        "Triton on a GPU and PyTorch on a CPU.",
    )
    draft_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Precision of the drafter's weights and cache; auto is the "
        "target's on a GPU and float32 on a CPU, where narrow products of float32 "
        "are the fastest.",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.eviction_policy != "keep_all" and self.kv_budget < self.min_budget:
            raise ValueError(
                f"kv_budget={self.kv_budget} is below {self.min_budget} tokens, the "
                f"sinks (sink_tokens={self.sink_tokens}) plus one chunk (chunk_size="
                f"{self.chunk_size}); raise kv_budget or lower sink_tokens"
            )
        floor = self.num_speculative_tokens + 2 * self.page_size
        if self.recent_window < floor:
            raise ValueError(
                f"recent_window={self.recent_window} is below {floor} tokens, the "
                f"drafts (num_speculative_tokens={self.num_speculative_tokens}) plus "
                f"two pages (page_size={self.page_size}); raise recent_window"
            )
        return self

    def cache_capacity(self, max_model_len: int) -> int:
        """Tokens of draft cache per request, a multiple of the page size.

        The budget, the recent window and the draft slots: one for each drafted token
        but the last, two for the tokens fed first (see ``DraftProposer.draft``). A
        request can never need more than ``max_model_len`` and its draft slots.
        """
        draft_slots = self.num_speculative_tokens + 1
        kept = self.kv_budget + self.recent_window
        if self.eviction_policy == "keep_all":
            kept = max_model_len
        tokens = min(kept, max_model_len) + draft_slots
        return -(-tokens // self.page_size) * self.page_size

    def scratch_tokens(self, max_model_len: int) -> int:
        """Tokens of the buffer that prompts are read through."""
        if self.draft_prefill == "full" or self.eviction_policy == "keep_all":
            return max_model_len
        return min(self.kv_budget + self.draft_prefill_chunk, max_model_len)


def parse_speculative_config(settings: dict[str, Any]) -> BudgetDraftConfig:
    """Reads the keys of a speculative config, less ``method``.

    Raises:
        ConfigurationError: names every key that is unknown, missing or out of range,
            with its value and limit.
    """
    try:
        return BudgetDraftConfig(**settings)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigurationError(
            "invalid speculative config for method 'budgetdraft':\n  "
            + "\n  ".join(lines)
        ) from None


def _explain(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = ", ".join(BudgetDraftConfig.model_fields)
        return f"unknown key {key!r} (value {problem['input']!r}); known keys: {known}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing; set it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}={problem['input']!r}: {message}" if key else message
