"""The keys of a speculative config, as users write them and as they are used."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vllm_budgetdraft.config.view import Switch, ViewSettings
from vllm_budgetdraft.errors import ConfigurationError, short

#: What a drafter without a cache of its own leaves nothing for.
CACHE_SETTINGS = (
    *("page_size", "pool_memory_gib", "snapshot_memory_gib", "position_mode"),
    *("draft_prefill", "draft_prefill_chunk"),
    "draft_vocabulary_size",
)


#: Longer passes take memory, and on a CPU time, for their activations leave its caches.
MAX_PASS_TOKENS = 4096


class BudgetDraftConfig(ViewSettings):
    """The settings of ``--speculative-config '{"method": "budgetdraft", ...}'``.

    What they leave out of a ``ViewSettings`` the drafter's folder says: see ``settle``.
    """

    model: str = Field(
        description="Folder of the drafter (Hugging Face layout), or the name of one "
        "in the hub's local cache."
    )
    drafter_type: Literal["auto", "decoder", "eagle3", "flexdraft"] = Field(
        "auto",
        description="What that is: a decoder, or an EAGLE-3 head, each with a cache of "
        "its own, or flexdraft, by which the target drafts from its own cache; auto is "
        "what the folder says.",
    )
    num_speculative_tokens: int = Field(
        ge=1, le=128, description="Most tokens drafted per step."
    )
    draft_sample_method: Literal["greedy", "probabilistic"] = Field(
        "probabilistic",
        description="How drafts of requests with a temperature are picked: greedy, or "
        "probabilistic, drawn at that temperature, so that vLLM accepts as many as can "
        "be, for max_num_seqs x num_speculative_tokens x vocabulary x 4 bytes, or half "
        "of that.",
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
    adaptive_draft_length: Switch = Field(
        "auto",
        description="Whether each step drafts as many tokens as pay best by its time "
        "and their acceptance, down to none; auto does, but with data parallelism, "
        "with an external launcher, and for flexdraft on several ranks.",
    )
    flex_decoding: Literal["auto", "parallel", "sequential"] = Field(
        "auto",
        description="When flexdraft drafts: parallel, in the pass in which the target "
        "verifies; sequential, after it; auto is what brings more tokens a second, and "
        "sequential where there is no choice: in model runner V2, with CUDA graphs, "
        "on several ranks, and for a drafter that must know the bonus token.",
    )
    kv_budget: int = Field(
        512,
        ge=1,
        le=16777216,
        description="Prompt tokens that the drafter's cache keeps per request. "
        "Unused by keep_all, which keeps every token.",
    )
    recent_window: int = Field(
        256,
        ge=1,
        le=16777216,
        description="Generated tokens that the drafter's cache keeps per request "
        "beside the budget.",
    )
    page_size: int = Field(
        16, ge=1, le=4096, description="Tokens per page of the draft cache."
    )
    pool_memory_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Memory of the draft cache in GiB, if not what max_num_seqs "
        "requests take; a request that finds no room in it goes on without drafts.",
    )
    snapshot_memory_gib: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Memory in GiB, beside what requests take, to keep draft caches "
        "of those that are over, so that a conversation's next turn is read from "
        "where the last one ended; by default what no request needs of the draft cache "
        "is used, 0 keeps none.",
    )
    draft_vocabulary_size: int | None = Field(
        None,
        strict=True,  # for False is no 0
        ge=0,
        le=4194304,
        description="Most tokens of the vocabulary that are drafted, the likeliest of "
        "those in the draft_vocabulary.st of the drafter's folder; by default "
        "all of the file, 0 for the whole vocabulary.",
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

    @field_validator("num_speculative_tokens_per_batch_size", mode="before")
    @classmethod
    def _ranges_are_of_whole_numbers(cls, schedule: Any) -> Any:
        for each in schedule if isinstance(schedule, list) else ():
            items = each if isinstance(each, list | tuple) else [each]
            if any(type(item) is not int for item in items):
                raise ValueError(
                    f"{short(repr(each), 100)} is not (first, last, length) in whole "
                    "numbers; write [1, 8, 4]"
                )
        return schedule

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
                f"the first range is {short(schedule[0])}; begin it at batch size 1"
            )
        previous = 0
        for first, last, length in schedule:
            if not previous < first <= last or length < 0:
                raise ValueError(
                    f"({short(first)}, {short(last)}, {short(length)}) is not "
                    f"(first, last, length) with {short(previous)} < first <= last "
                    "and length >= 0; mend it"
                )
            previous = last
        return schedule

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

    drafter_type: Literal["decoder", "eagle3", "flexdraft"] = "decoder"
    #: Most prompt tokens that one engine step reads, if the user set
    #: ``draft_prefill_chunk``. What training wrote of it is about its view alone.
    max_step_tokens: int | None = None

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

    def pass_tokens(self, batch_tokens: int) -> int:
        """Most prompt tokens that one pass of the drafter reads.

        Args:
            batch_tokens: most tokens that a step of the target computes.
        """
        return min(self.max_step_tokens or batch_tokens, MAX_PASS_TOKENS)

    def held_tokens(self, max_model_len: int, native_tokens: int) -> int:
        """Most tokens of one prompt that are held while it is read.

        Args:
            native_tokens: longest context that the drafter was made for.
        """
        if self.draft_prefill == "full":
            return max_model_len
        tokens = self.budget(max_model_len) + self.draft_prefill_chunk
        if self.position_mode == "cache_relative":
            tokens = min(tokens, native_tokens)
        return min(tokens, max_model_len)


def check_flexdraft_settings(config: BudgetDraftConfig) -> None:
    """Raises ConfigurationError for settings that mean nothing to flexdraft."""
    if given := sorted(config.model_fields_set.intersection(CACHE_SETTINGS)):
        raise ConfigurationError(
            f"{given} are about a drafter's own cache; flexdraft reads the target's "
            "cache; leave them out"
        )
    if config.draft_dtype not in ("auto", "float32"):
        raise ConfigurationError(
            f"draft_dtype={config.draft_dtype!r}: flexdraft computes in the target's "
            "type; use 'auto', or on a CPU 'float32' for matrices that are not packed"
        )
