"""What decides which keys a drafter sees; training and serving share it."""

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

#: On, off, or as is best.
Switch = bool | Literal["auto"]
BUILT_IN_POLICIES = (
    "chunk_retrieval",
    "observation_window",
    "heavy_hitter",
    "last_query",
    "key_diversity",
    "sink_window",
    "keep_all",
)


class EvictionSettings(BaseModel):
    """What an eviction policy needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    eviction_policy: str = Field(
        "chunk_retrieval",
        description="Which positions the draft cache keeps: chunk_retrieval, "
        "observation_window, heavy_hitter, last_query, key_diversity, sink_window, "
        "keep_all, or your own class as 'package.module:Class'.",
    )
    sink_tokens: int = Field(
        8,
        ge=0,
        le=65536,
        description="First tokens of the prompt that are always kept.",
    )
    local_tokens: int = Field(
        256,
        ge=0,
        le=16777216,
        description="Last tokens of the prompt that chunk_retrieval always keeps; at "
        "most half of the budget that the sinks leave.",
    )
    chunk_size: int = Field(
        8,
        ge=1,
        le=4096,
        description="Tokens per chunk that chunk_retrieval keeps or drops.",
    )
    chunk_score: Literal["last_key", "last_queries"] = Field(
        "last_key",
        description="How chunk_retrieval scores a chunk: last key of the prompt "
        "against the chunk's mean key, or attention of the last queries.",
    )
    observation_tokens: int = Field(
        16,
        ge=1,
        le=4096,
        description="Last prompt queries used by chunk_score=last_queries and by "
        "observation_window, which also keeps their tokens.",
    )
    pooling_size: int = Field(
        5,
        ge=1,
        le=1023,
        description="Neighbours, an odd number, over which observation_window averages "
        "attention.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_written_so(cls, value: Any, field: ValidationInfo) -> Any:
        """A whole one neither "512" nor 512.0, and true is no 1, and 1 not true."""
        assert field.field_name is not None
        wanted = cls.model_fields[field.field_name].annotation
        if wanted is int and type(value) is not int:
            raise ValueError("it must be a whole number, as 512 is")
        if wanted == Switch and type(value) is not bool and value != "auto":
            raise ValueError("it must be 'auto', true or false")
        if wanted in (float, float | None) and type(value) in (str, bool):
            raise ValueError("it must be a number, as 0.5 is")
        return value

    @model_validator(mode="after")
    def _policy_is_known(self) -> Self:
        name = self.eviction_policy
        if name not in BUILT_IN_POLICIES and ":" not in name:
            raise ValueError(
                f"eviction_policy={name[:100]!r} is unknown; use one of "
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


class ViewSettings(EvictionSettings):
    """All that decides which keys of a prompt a drafter sees, beside the budget.

    Training writes them into the drafter's folder, and serving takes them from there.
    """

    position_mode: Literal["absolute", "cache_relative"] = Field(
        "absolute",
        description="Where the drafter's keys stand: absolute, at their position in "
        "the context, or cache_relative, at their index in the draft cache, so that a "
        "drafter of a short native range drafts at any context.",
    )
    draft_prefill: Literal["full", "streaming"] = Field(
        "full",
        description="How the drafter reads a prompt: in full, keeping the budget in "
        "the end, or streaming, keeping the budget after every chunk, so that time is "
        "linear in the prompt and memory does not depend on it. Streaming is the "
        "default for cache_relative positions, which need it for long prompts.",
    )
    draft_prefill_chunk: int = Field(
        4096,
        ge=1,
        le=16777216,
        description="Streaming keeps the budget after so many prompt tokens, or as "
        "many as the native range leaves for cache_relative positions. If set, an "
        "engine step reads no more, of all requests together; else it reads what the "
        "drafter can in the time of a full step of the target.",
    )
