"""Every setting, declared once: JSON keys, command line and README share this list."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_budgetdraft.errors import ConfigurationError

Config = TypeVar("Config", bound="BudgetDraftConfig")

BUILT_IN_POLICIES = (
    "chunk_retrieval",
    "observation_window",
    "heavy_hitter",
    "sink_window",
    "keep_all",
)


class EvictionSettings(BaseModel):
    """What an eviction policy needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    eviction_policy: str = Field(
        "chunk_retrieval",
        description="Which positions the draft cache keeps: chunk_retrieval, "
        "observation_window, heavy_hitter, sink_window, keep_all, or your own class as "
        "'package.module:Class'.",
    )
    sink_tokens: int = Field(
        8, ge=0, description="First tokens of the prompt that are always kept."
    )
    local_tokens: int = Field(
        256,
        ge=0,
        description="Last tokens of the prompt that chunk_retrieval always keeps; at "
        "most half of the budget that the sinks leave.",
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


class ViewSettings(EvictionSettings):
    """All that decides which keys a drafter sees, beside the budget.

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
        description="Prompt tokens that the drafter reads at once; in serving, per "
        "engine step, of all requests together. Streaming keeps the budget after so "
        "many, or as many as the native range leaves for cache_relative positions.",
    )


class BudgetDraftConfig(ViewSettings):
    """The settings of ``--speculative-config '{"method": "budgetdraft", ...}'``.

    What they leave out of a ``ViewSettings`` the drafter's folder says: see ``settle``.
    """

    model: str = Field(description="Folder of the drafter (Hugging Face layout).")
    drafter_type: Literal["auto", "decoder", "flexdraft"] = Field(
        "auto",
        description="What that is: a decoder, which keeps a cache of its own, or "
        "flexdraft, by which the target drafts from its own cache; auto is what the "
        "folder says.",
    )
    num_speculative_tokens: int = Field(
        ge=1, le=128, description="Most tokens drafted per step."
    )
    draft_sample_method: Literal["greedy", "probabilistic"] = Field(
        "probabilistic",
        description="How drafts of requests with a temperature are picked: greedy, or "
        "probabilistic, drawn at that temperature, so that vLLM accepts as many as can "
        "be, for max_num_seqs x num_speculative_tokens x vocabulary x 4 bytes.",
    )
    draft_confidence_threshold: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="A request's draft ends where the product of the drafter's "
        "probabilities falls below this; 0 never ends one. Drafts of many lengths cost "
        "vLLM its full CUDA graphs.",
    )
    num_speculative_tokens_per_batch_size: list[tuple[int, int, int]] | None = Field(
        None,
        description="Fewer tokens for larger batches: [[1, 8, 8], [9, 32, 2], "
        "[33, 256, 0]] drafts 8 for 1 to 8 requests, 2 for 9 to 32 and none for more.",
    )
    adaptive_draft_length: bool = Field(
        False,
        description="Whether to learn, from step times and acceptance, how many tokens "
        "to draft, down to none where drafting does not pay.",
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
    pool_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of the draft cache in GiB, if not what max_num_seqs "
        "requests take; a request that finds no room in it goes on without drafts.",
    )
    attention_backend: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="What the drafter's attention and cache operations run on; auto is "
        "Triton on a GPU and PyTorch on a CPU.",
    )
    draft_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Precision of the drafter's weights and cache; auto is the "
        "target's on a GPU, and on a CPU float32 with matrices packed in float16, "
        "where PyTorch can (x86), for they are read once for every token.",
    )

    @field_validator("num_speculative_tokens_per_batch_size")
    @classmethod
    def _ranges_follow(
        cls, schedule: list[tuple[int, int, int]] | None
    ) -> list[tuple[int, int, int]] | None:
        if schedule is None:
            return None
        if not schedule:
            raise ValueError("the list is empty; leave it out, or give a range")
        schedule = sorted(schedule)
        if schedule[0][0] != 1:
            raise ValueError(
                f"the first range is {schedule[0]}; begin it at batch size 1"
            )
        previous = 0
        for first, last, length in schedule:
            if not previous < first <= last or length < 0:
                raise ValueError(
                    f"({first}, {last}, {length}) is not (first, last, length) with "
                    f"{previous} < first <= last and length >= 0; mend it"
                )
            previous = last
        return schedule

    @model_validator(mode="before")
    @classmethod
    def _auto_is_left_out(cls, settings: Any) -> Any:
        """``auto`` is what the drafter was trained with, as if nothing were said."""
        names = ("position_mode", "draft_prefill")
        if not isinstance(settings, dict):
            return settings
        return {
            name: value
            for name, value in settings.items()
            if not (name in names and value == "auto")
        }

    @model_validator(mode="after")
    def _recent_window_holds_drafts(self) -> Self:
        floor = self.num_speculative_tokens + 2 * self.page_size
        if self.recent_window < floor:
            raise ValueError(
                f"recent_window={self.recent_window} is below {floor} tokens, the "
                f"drafts (num_speculative_tokens={self.num_speculative_tokens}) plus "
                f"two pages (page_size={self.page_size}); raise recent_window"
            )
        return self


class SettledConfig(BudgetDraftConfig):
    """What a ``BudgetDraftConfig`` means for its drafter: see ``settle``.

    Only what depends on the device, attention_backend and draft_dtype, may be "auto".
    """

    drafter_type: Literal["decoder", "flexdraft"] = "decoder"

    @model_validator(mode="after")
    def _budget_holds_a_chunk(self) -> Self:
        if self.eviction_policy != "keep_all" and self.kv_budget < self.min_budget:
            raise ValueError(
                f"kv_budget={self.kv_budget} is below {self.min_budget} tokens, the "
                f"sinks (sink_tokens={self.sink_tokens}) plus one chunk (chunk_size="
                f"{self.chunk_size}); raise kv_budget or lower sink_tokens"
            )
        return self

    def budget(self, max_model_len: int) -> int:
        """Most prompt tokens that a request keeps."""
        keeps_all = self.eviction_policy == "keep_all"
        return max_model_len if keeps_all else min(self.kv_budget, max_model_len)

    def cache_capacity(self, max_model_len: int, budget: int | None = None) -> int:
        """Tokens of draft cache per request, a multiple of the page size.

        The budget, the recent window and the draft slots: one for each drafted token
        but the last, two for the tokens fed first (see ``DraftProposer.draft``). A
        request can never need more than ``max_model_len`` and its draft slots.

        Args:
            budget: of the request; the configured one if None.
        """
        draft_slots = self.num_speculative_tokens + 1
        kept = self.budget(max_model_len) if budget is None else budget
        tokens = min(kept + self.recent_window, max_model_len) + draft_slots
        return -(-tokens // self.page_size) * self.page_size

    def scratch_tokens(self, max_model_len: int, native_tokens: int) -> int:
        """Tokens of the buffer that prompts are read through.

        Args:
            native_tokens: longest context that the drafter was made for.
        """
        if self.draft_prefill == "full":
            return max_model_len
        tokens = self.budget(max_model_len) + self.draft_prefill_chunk
        if self.position_mode == "cache_relative":
            tokens = min(tokens, native_tokens)
        return min(tokens, max_model_len)


class RequestSettings(BaseModel):
    """What a request may ask for, among its ``SamplingParams.extra_args``.

    Attributes:
        kv_budget: prompt tokens that its draft cache keeps; as configured if None.
        num_speculative_tokens: most tokens drafted per step, 0 for none; as configured
            if None.
    """

    model_config = ConfigDict(frozen=True)

    kv_budget: int | None = None
    num_speculative_tokens: int | None = None


#: What a drafter without a cache of its own leaves nothing for.
CACHE_SETTINGS = (
    *("page_size", "pool_memory_gib", "position_mode"),
    *("draft_prefill", "draft_prefill_chunk", "draft_dtype"),
)


def check_flexdraft_settings(config: BudgetDraftConfig) -> None:
    """Raises ConfigurationError for settings that mean nothing to flexdraft."""
    if given := sorted(config.model_fields_set.intersection(CACHE_SETTINGS)):
        raise ConfigurationError(
            f"{given} are about a drafter's own cache and weights; flexdraft reads the "
            "target's cache, in the target's type; leave them out"
        )


def parse_request_settings(
    extra_args: dict[str, Any] | None, config: SettledConfig
) -> RequestSettings:
    """Reads our keys of a request's ``extra_args``, which may hold those of others.

    Raises:
        ConfigurationError: a value is no number, or outside what ``config`` allows.
    """
    try:
        asked = RequestSettings(**(extra_args or {}))
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigurationError(
            "invalid extra_args (vllm_xargs): " + "; ".join(lines)
        ) from None
    limits = {"num_speculative_tokens": (0, config.num_speculative_tokens)}
    if config.eviction_policy != "keep_all":
        limits["kv_budget"] = (config.min_budget, config.kv_budget)
    elif asked.kv_budget is not None:
        raise ConfigurationError(
            f"invalid extra_args (vllm_xargs): kv_budget={asked.kv_budget} means "
            "nothing to eviction_policy='keep_all'; leave it out"
        )
    for key, (lowest, highest) in limits.items():
        value = getattr(asked, key)
        if value is not None and not lowest <= value <= highest:
            raise ConfigurationError(
                f"invalid extra_args (vllm_xargs): {key}={value} is not within "
                f"{lowest} to {highest}, which this server allows; choose a value there"
            )
    return asked


def parse_speculative_config(settings: dict[str, Any]) -> BudgetDraftConfig:
    """Reads the keys of a speculative config, less ``method``.

    Raises:
        ConfigurationError: names every key that is unknown, missing or out of range,
            with its value and limit.
    """
    return _valid(BudgetDraftConfig, settings)


def settle(
    config: BudgetDraftConfig,
    trained: Mapping[str, Any],
    drafter_type: Literal["decoder", "flexdraft"] = "decoder",
) -> SettledConfig:
    """The config with what it leaves out of the view as the drafter was trained.

    Args:
        trained: what the ``config.json`` of the drafter's folder has under
            ``budgetdraft``; empty if it was trained elsewhere.
        drafter_type: what the folder holds.

    Raises:
        ConfigurationError: settings that do not fit each other.
    """
    given = config.model_dump(exclude_unset=True)
    settings = _view_of(trained) | given | {"drafter_type": drafter_type}
    is_relative = settings.get("position_mode") == "cache_relative"
    if is_relative and "draft_prefill" not in given:
        settings["draft_prefill"] = "streaming"  # whose range a prompt may exceed
    return _valid(SettledConfig, settings)


def compare_views(
    config: BudgetDraftConfig, trained: Mapping[str, Any]
) -> tuple[str, str]:
    """What ``settle`` takes from the drafter's folder, and what the user has otherwise.

    Returns:
        Settings and values, each may be empty.
    """
    given = config.model_dump(exclude_unset=True)
    taken, different = [], []
    for name, value in _view_of(trained).items():
        if name not in given:
            taken.append(f"{name}={value!r}")
        elif given[name] != value:
            different.append(f"{name}={given[name]!r} (trained with {value!r})")
    return ", ".join(taken), ", ".join(different)


def _view_of(trained: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: trained[name] for name in ViewSettings.model_fields if name in trained
    }


def _valid(kind: type[Config], settings: dict[str, Any]) -> Config:
    try:
        return kind(**settings)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigurationError(
            "invalid speculative config for method 'budgetdraft':\n  "
            + "\n  ".join(lines)
        ) from None


def _explain(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = list(BudgetDraftConfig.model_fields)
        close = get_close_matches(key, known, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        return (
            f"unknown key {key!r} (value {problem['input']!r}); {meant}known keys: "
            f"{', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"key {key!r} is missing; set it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}={problem['input']!r}: {message}" if key else message
