"""What a config leaves to the drafter's checkpoint."""

import pytest

from tests.support import models
from vllm_budgetdraft.config import (
    BudgetDraftConfig,
    SettledConfig,
    ViewSettings,
    compare_views,
    settle,
)
from vllm_budgetdraft.drafter.configuration import check_native_range
from vllm_budgetdraft.errors import ConfigurationError

#: Of no setting the default.
TRAINED = {
    "eviction_policy": "heavy_hitter",
    "sink_tokens": 4,
    "local_tokens": 64,
    "chunk_size": 16,
    "chunk_score": "last_queries",
    "observation_tokens": 8,
    "pooling_size": 7,
    "position_mode": "cache_relative",
    "draft_prefill": "streaming",
    "draft_prefill_chunk": 400,
}


def asked(**settings) -> BudgetDraftConfig:
    sizes = {"kv_budget": 256, "recent_window": 128}
    return BudgetDraftConfig(
        model="drafter", num_speculative_tokens=4, **{**sizes, **settings}
    )


def settled(trained=None, **settings) -> SettledConfig:
    return settle(asked(**settings), trained or {})


def view_of(config: SettledConfig) -> dict:
    return config.model_dump(include=ViewSettings.model_fields.keys())


def test_a_drafter_trained_elsewhere_has_the_defaults():
    assert view_of(settled()) == ViewSettings().model_dump()


def test_the_whole_view_is_the_drafters():
    assert TRAINED.keys() == ViewSettings.model_fields.keys()
    assert view_of(settled({**TRAINED, "budgets": [64]})) == TRAINED
    taken, different = compare_views(asked(), TRAINED)
    assert all(f"{name}={value!r}" in taken for name, value in TRAINED.items())
    assert not different


@pytest.mark.parametrize("name", TRAINED)
def test_what_a_user_says_is_taken_and_told_of(name):
    default = ViewSettings.model_fields[name].default
    assert view_of(settled(TRAINED, **{name: default})) == {**TRAINED, name: default}
    taken, different = compare_views(asked(**{name: default}), TRAINED)
    assert f"{name}=" not in taken
    assert different == f"{name}={default!r} (trained with {TRAINED[name]!r})"
    assert not compare_views(asked(**{name: TRAINED[name]}), TRAINED)[1]


def test_settling_again_changes_nothing():
    once = settled(TRAINED, chunk_size=32)
    assert settle(once, TRAINED) == settle(once, {}) == once


def test_cache_relative_positions_stream_where_nobody_says_otherwise():
    """A prompt may exceed their range."""
    trained = {"position_mode": "cache_relative"}
    assert settled(trained).draft_prefill == "streaming"
    assert settled(position_mode="cache_relative").draft_prefill == "streaming"
    assert settled(trained, draft_prefill="full").draft_prefill == "full"
    assert settled({**trained, "draft_prefill": "full"}).draft_prefill == "full"


def test_code_that_a_folder_names_is_not_run():
    trained = {"eviction_policy": "some.module:Policy"}
    with pytest.raises(ConfigurationError, match="set eviction_policy to that"):
        settled(trained)
    own = "some.module:Policy"
    assert settled(trained, eviction_policy=own).eviction_policy == own
    assert settled(trained, eviction_policy="keep_all").eviction_policy == "keep_all"


def test_what_a_folder_names_is_not_said_whole():
    with pytest.raises(ConfigurationError, match="code is not run") as refusal:
        settled({"eviction_policy": ["a:b" * 10_000]})
    assert len(str(refusal.value)) < 1000


def test_a_budget_is_held_against_the_drafters_chunks():
    assert settled({"chunk_size": 4}, kv_budget=12).kv_budget == 12
    with pytest.raises(ConfigurationError, match="kv_budget=12 is below 16 tokens"):
        settled(kv_budget=12)
    with pytest.raises(ConfigurationError, match="kv_budget=100 .*chunk_size=64"):
        settled({"chunk_size": 64}, kv_budget=100)


def test_what_no_view_can_be_is_refused():
    """Of a folder, whose name is told, as of a user."""
    with pytest.raises(ConfigurationError, match="of drafter.*\n.*chunk_size='many'"):
        settled({"chunk_size": "many"})


@pytest.mark.parametrize(
    ("settings", "mentions"),
    [
        ({"kv_budget": 400}, ["takes 544 positions", "512", "lower kv_budget"]),
        ({"eviction_policy": "keep_all"}, ["takes 4112 positions", "512"]),
        (
            {"draft_prefill": "full"},
            ["takes 4096 positions", "512", "draft_prefill='streaming'"],
        ),
    ],
)
def test_cache_relative_positions_beyond_the_native_range_are_refused(
    settings, mentions
):
    config = settled(position_mode="cache_relative", **settings)
    drafter = models.llama(max_position_embeddings=512)
    with pytest.raises(ConfigurationError) as refusal:
        check_native_range(config, drafter, max_model_len=4096)
    for part in ("cache_relative", "max_position_embeddings", *mentions):
        assert part in str(refusal.value)


def test_a_short_context_may_be_read_in_full_with_cache_relative_positions():
    config = settled(position_mode="cache_relative", draft_prefill="full")
    check_native_range(config, models.llama(max_position_embeddings=512), 400)
