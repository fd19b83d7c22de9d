"""From what users write to settings, with errors that name key, value and remedy."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_budgetdraft.config.speculative import BudgetDraftConfig, SettledConfig
from vllm_budgetdraft.config.view import ViewSettings
from vllm_budgetdraft.errors import ConfigurationError, short

#: Kinds of pydantic's errors whose text is a limit alone.
LIMITS = {
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
    *("finite_number", "literal_error"),
}

Settings = TypeVar("Settings", bound=ViewSettings)

ELSEWHERE = "it belongs to another method; leave it out"
ALWAYS = "it is not to be chosen here; leave it out"
UNKNOWN = "unknown key"
#: So many mistakes are explained at once.
MOST_EXPLAINED = 8
#: Keys of vLLM's other methods, and what to do about each.
FOREIGN_KEYS = {
    "tensor_parallel_size": "the drafter runs on one device; leave it out",
    "draft_tensor_parallel_size": "the drafter runs on one device; leave it out",
    "max_model_len": "it is the target's; set vLLM's --max-model-len",
    "enforce_eager": "it is the target's; set vLLM's --enforce-eager",
    "quantization": "weights are read as their folder has them; leave it out",
    "draft_load_config": "weights are read from safetensors; leave it out",
    "kv_cache_dtype": "the draft cache has the type of draft_dtype; set that",
    "revision": "give the folder of that revision as model",
    "code_revision": "a drafter has no code of its own; leave it out",
    "disable_padded_drafter_batch": ALWAYS,
    "rejection_sample_method": ALWAYS,
    "use_heterogeneous_vocab": "a drafter has the target's tokenizer; leave it out",
    "parallel_drafting": ELSEWHERE,
    "prompt_lookup_max": ELSEWHERE,
    "prompt_lookup_min": ELSEWHERE,
    "suffix_decoding_max_tree_depth": ELSEWHERE,
    "suffix_decoding_max_cached_requests": ELSEWHERE,
    "suffix_decoding_max_spec_factor": ELSEWHERE,
    "suffix_decoding_min_token_prob": ELSEWHERE,
    "speculative_token_tree": ELSEWHERE,
}


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


def parse_request_settings(
    extra_args: dict[str, Any] | None, config: SettledConfig
) -> RequestSettings:
    """Reads our keys of a request's ``extra_args``, which may hold other keys, too.

    Raises:
        ConfigurationError: a value is no number, or outside what ``config`` allows.
    """
    given = extra_args or {}
    ours = {name: given[name] for name in RequestSettings.model_fields if name in given}
    try:
        asked = RequestSettings(**ours)
    except ValidationError as error:
        lines = _explanations(error)
        raise ConfigurationError(
            "invalid extra_args (vllm_xargs): " + "; ".join(lines)
        ) from None
    limits = {"num_speculative_tokens": (0, config.num_speculative_tokens)}
    if config.eviction_policy != "keep_all":
        limits["kv_budget"] = (config.min_budget, config.kv_budget)
    elif asked.kv_budget is not None:
        raise ConfigurationError(
            f"invalid extra_args (vllm_xargs): kv_budget={short(asked.kv_budget)} "
            "means nothing to eviction_policy='keep_all'; leave it out"
        )
    for key, (lowest, highest) in limits.items():
        value = getattr(asked, key)
        if value is not None and not lowest <= value <= highest:
            raise ConfigurationError(
                f"invalid extra_args (vllm_xargs): {key}={short(value)} is not within "
                f"{lowest} to {highest}, which this server allows; choose a value there"
            )
    return asked


def parse_speculative_config(settings: dict[str, Any]) -> BudgetDraftConfig:
    """Reads the keys of a speculative config, less ``method``.

    Raises:
        ConfigurationError: names every key that is unknown, missing or out of range,
            with its value and limit.
    """
    return valid(
        BudgetDraftConfig, settings, "speculative config for method 'budgetdraft'"
    )


def settle(
    config: BudgetDraftConfig,
    trained: Mapping[str, Any],
    drafter_type: Literal["decoder", "eagle3", "flexdraft"] = "decoder",
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
    # What was settled before keeps its own.
    settings.setdefault("max_step_tokens", given.get("draft_prefill_chunk"))
    if settings.get("position_mode") == "cache_relative":
        settings.setdefault("draft_prefill", "streaming")  # for any length of prompt
    policy = settings.get("eviction_policy")
    if "eviction_policy" not in given and ":" in str(policy):
        raise ConfigurationError(
            f"{short(config.model)} was trained with eviction_policy="
            f"{short(repr(policy))}, and code is not run because a drafter's folder "
            "names it; set eviction_policy to that, or to another"
        )
    return valid(
        SettledConfig,
        settings,
        f"settings (what is not set is of {short(config.model)})",
    )


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


def valid(kind: type[Settings], settings: dict[str, Any], what: str) -> Settings:
    """Settings of a kind.

    Args:
        what: they are, for the error.

    Raises:
        ConfigurationError: names every key that is unknown, missing or out of range,
            with its value and limit.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        lines = _explanations(error)
        raise ConfigurationError(f"invalid {what}:\n  " + "\n  ".join(lines)) from None


def _explanations(error: ValidationError) -> list[str]:
    """Of each problem, or of the first where there are many."""
    problems = error.errors()
    lines = [_explain(problem) for problem in problems[:MOST_EXPLAINED]]
    if len(problems) > MOST_EXPLAINED:
        lines.append(f"and {len(problems) - MOST_EXPLAINED} more")
    if any(line.startswith(UNKNOWN) for line in lines):
        lines.append(f"known keys: {', '.join(BudgetDraftConfig.model_fields)}")
    return lines


def _explain(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    value = repr(problem["input"])
    if len(value) > 100:
        value = f"{value[:100]}... ({len(value)} characters)"
    if problem["type"] == "extra_forbidden":
        if key in FOREIGN_KEYS:
            return f"{key}={value}: {FOREIGN_KEYS[key]}"
        known = list(BudgetDraftConfig.model_fields)
        close = get_close_matches(key, known, n=1)
        meant = f"did you mean {close[0]!r}?" if close else ""
        return f"{UNKNOWN} {short(repr(key), 100)} (value {value}); {meant}".rstrip(
            "; "
        )
    if problem["type"] == "string_unicode" and not key:
        return f"{UNKNOWN} {value}, which is no text"
    if problem["type"] == "missing":
        return f"key {key!r} is missing; set it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in LIMITS:
        message += "; choose a value there"
    return f"{short(key, 100)}={value}: {message}" if key else message
