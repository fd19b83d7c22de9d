"""What a config leaves to the drafter's checkpoint."""

import pytest

from tests.support import models
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.drafter.configuration import settle
from vllm_budgetdraft.errors import ConfigurationError


def settled(recorded=None, prefill=None, native=512, max_model_len=4096, **settings):
    drafter = models.llama(max_position_embeddings=native)
    if recorded is not None:
        drafter.budgetdraft = {"position_mode": recorded, "budgets": [64]}
        if prefill is not None:
            drafter.budgetdraft["draft_prefill"] = prefill
    config = BudgetDraftConfig(
        **{
            "model": "drafter",
            "num_speculative_tokens": 4,
            "kv_budget": 256,
            "recent_window": 128,
            **settings,
        }
    )
    config = settle(config, drafter, max_model_len)
    return config.position_mode, config.draft_prefill


def test_positions_are_absolute_unless_the_drafter_or_the_user_says_otherwise():
    assert settled() == ("absolute", "full")
    assert settled(recorded="absolute") == ("absolute", "full")
    assert settled(recorded="cache_relative") == ("cache_relative", "streaming")
    assert settled(position_mode="cache_relative") == ("cache_relative", "streaming")


@pytest.mark.parametrize("trained", ["full", "streaming"])
def test_prompts_are_read_as_in_training_where_any_length_can_be(trained):
    assert settled(recorded="absolute", prefill=trained)[1] == trained
    assert settled(recorded="cache_relative", prefill=trained)[1] == "streaming"
    asked = {"draft_prefill": "full" if trained == "streaming" else "streaming"}
    found = settled(recorded="absolute", prefill=trained, **asked)[1]
    assert found == asked["draft_prefill"]


def test_what_agrees_is_no_conflict():
    for mode in ("absolute", "cache_relative"):
        assert settled(recorded=mode, position_mode=mode)[0] == mode


@pytest.mark.parametrize(
    ("recorded", "asked"),
    [("absolute", "cache_relative"), ("cache_relative", "absolute")],
)
def test_another_mode_than_the_drafter_was_trained_with_is_refused(recorded, asked):
    with pytest.raises(ConfigurationError) as refusal:
        settled(recorded=recorded, position_mode=asked)
    for part in (f"position_mode='{asked}'", f"'{recorded}'", "leave position_mode"):
        assert part in str(refusal.value)


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
    with pytest.raises(ConfigurationError) as refusal:
        settled(position_mode="cache_relative", **settings)
    for part in ("cache_relative", "max_position_embeddings", *mentions):
        assert part in str(refusal.value)


def test_a_short_context_may_be_read_in_full_with_cache_relative_positions():
    modes = settled(
        position_mode="cache_relative", draft_prefill="full", max_model_len=400
    )
    assert modes == ("cache_relative", "full")
