import pytest

from vllm_budgetdraft.config import (
    FOREIGN_KEYS,
    BudgetDraftConfig,
    RequestSettings,
    parse_request_settings,
    parse_speculative_config,
    settle,
)
from vllm_budgetdraft.errors import ConfigurationError

VALID = {"model": "drafter", "num_speculative_tokens": 4}


def settings(**changes):
    return settle(parse_speculative_config({**VALID, **changes}), {})


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        pytest.param(
            {"kv_bugdet": 512},
            [
                "unknown key 'kv_bugdet' (value 512); did you mean 'kv_budget'?",
                "kv_budget, recent_window",
            ],
            id="unknown_key",
        ),
        pytest.param(
            {"eviction_policy": "lru"},
            ["eviction_policy", "'lru'", "chunk_retrieval", "package.module:Class"],
            id="unknown_policy",
        ),
        pytest.param(
            {"kv_budget": 15},
            ["kv_budget=15", "below 16", "raise kv_budget or lower sink_tokens"],
            id="budget_below_sinks_and_one_chunk",
        ),
        pytest.param(
            {"kv_budget": 40, "sink_tokens": 33},
            ["kv_budget=40", "below 48", "sink_tokens=33", "chunk_size=8"],
            id="budget_below_whole_sink_chunks",
        ),
        pytest.param(
            {"kv_budget": 40, "sink_tokens": 33, "eviction_policy": "sink_window"},
            ["kv_budget=40", "below 41", "sink_tokens=33"],
            id="budget_below_sink_window",
        ),
        pytest.param(
            {"num_speculative_tokens": 0},
            ["num_speculative_tokens=0", "greater than or equal to 1"],
            id="no_drafts",
        ),
        pytest.param(
            {"recent_window": 35},
            ["recent_window=35", "below 36", "page_size=16", "raise recent_window"],
            id="recent_window_too_small",
        ),
        pytest.param(
            {"chunk_score": "mean"},
            ["chunk_score='mean'", "'last_key' or 'last_queries'"],
            id="unknown_score",
        ),
        pytest.param(
            {"pool_memory_gib": 0},
            ["pool_memory_gib=0", "greater than 0; choose a value there"],
            id="no_memory",
        ),
        pytest.param(
            {"position_mode": "relative"},
            [
                "position_mode='relative'",
                "'absolute' or 'cache_relative'; choose a value there",
            ],
            id="unknown_position_mode",
        ),
        pytest.param(
            {"draft_sample_method": "sampled"},
            ["draft_sample_method='sampled'", "'greedy' or 'probabilistic'"],
            id="unknown_sample_method",
        ),
        pytest.param(
            {"draft_confidence_threshold": 1.0},
            ["draft_confidence_threshold=1.0", "less than 1"],
            id="threshold_that_nothing_reaches",
        ),
        pytest.param(
            {"draft_confidence_threshold": -0.1},
            ["draft_confidence_threshold=-0.1", "greater than or equal to 0"],
            id="threshold_below_zero",
        ),
        pytest.param(
            {"adaptive_draft_length": "perhaps"},
            ["adaptive_draft_length='perhaps'", "'auto', true or false"],
            id="not_a_boolean",
        ),
        pytest.param(
            {"page_size": "sixteen"},
            ["page_size='sixteen'", "a whole number"],
            id="not_a_number",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_value_limit_and_remedy(
    changes, mentions
):
    with pytest.raises(ConfigurationError) as refusal:
        settings(**changes)
    for part in mentions:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("schedule", "mentions"),
    [
        pytest.param([], ["the list is empty", "give a range"], id="empty"),
        pytest.param(
            [(2, 4, 1)], ["(2, 4, 1)", "begin it at batch size 1"], id="begins_at_2"
        ),
        pytest.param(
            [(0, 4, 1)], ["(0, 4, 1)", "begin it at batch size 1"], id="begins_at_0"
        ),
        pytest.param(
            [(1, 4, 2), (4, 8, 1)],
            ["(4, 8, 1) is not (first, last, length)", "4 < first"],
            id="overlap",
        ),
        pytest.param(
            [(5, 6, 2), (1, 9, 3)],
            ["(5, 6, 2) is not (first, last, length)", "9 < first"],
            id="overlap_out_of_order",
        ),
        pytest.param(
            [(1, 3, 2), (6, 5, 1)],
            ["(6, 5, 1) is not (first, last, length)", "first <= last"],
            id="ends_before_it_begins",
        ),
        pytest.param(
            [(1, 4, -1)],
            ["(1, 4, -1) is not (first, last, length)", "length >= 0"],
            id="negative_length",
        ),
        pytest.param([(1, 4)], [".0.2' is missing"], id="not_a_triple"),
        pytest.param([(1, 4, 2, 7)], [".0=", "3 items"], id="four_numbers"),
        pytest.param(
            [(1, 4, "few")], ["'few') is not", "whole numbers"], id="not_a_number"
        ),
        pytest.param({"1": 4}, ["={'1': 4}", "valid list"], id="not_a_list"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_with_the_range_and_remedy(
    schedule, mentions
):
    with pytest.raises(ConfigurationError) as refusal:
        settings(num_speculative_tokens_per_batch_size=schedule)
    for part in ("num_speculative_tokens_per_batch_size", *mentions):
        assert part in str(refusal.value)


def test_a_schedule_may_come_in_any_order_and_with_gaps():
    schedule = [[33, 256, 0], [1, 8, 9], [12, 12, 2]]
    config = settings(num_speculative_tokens_per_batch_size=schedule)
    assert config.num_speculative_tokens_per_batch_size == [
        (1, 8, 9),
        (12, 12, 2),
        (33, 256, 0),
    ]
    assert settings().num_speculative_tokens_per_batch_size is None


def test_a_missing_model_is_named():
    with pytest.raises(ConfigurationError, match="key 'model' is missing; set it"):
        parse_speculative_config({"num_speculative_tokens": 4})


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(ConfigurationError) as refusal:
        settings(kv_bugdet=1, page_sise=2, num_speculative_tokens=0)
    for key in ("kv_bugdet", "page_sise", "num_speculative_tokens"):
        assert key in str(refusal.value)


def test_the_smallest_sizes_that_are_not_refused_are_accepted():
    config = settings(kv_budget=16, recent_window=36)
    assert (config.kv_budget, config.recent_window) == (16, 36)


def test_keep_all_takes_any_budget():
    assert settings(eviction_policy="keep_all", kv_budget=1).kv_budget == 1


def test_a_class_of_the_user_is_accepted_by_name():
    name = "my_package.policies:Mine"
    assert settings(eviction_policy=name).eviction_policy == name


def test_settings_cannot_change_after_they_were_checked():
    with pytest.raises(ValueError, match="frozen"):
        settings().kv_budget = 1


def test_every_setting_is_described():
    for name, field in BudgetDraftConfig.model_fields.items():
        assert field.description, name


# By hand: the tokens kept, one slot for each draft but the last, two for the first
# tokens fed, rounded up to whole pages.
@pytest.mark.parametrize(
    ("changes", "max_model_len", "capacity"),
    [
        ({}, 100_000, 784),  # 512 + 256 + 5 = 773
        ({"page_size": 8}, 100_000, 776),
        ({"kv_budget": 500, "recent_window": 99, "page_size": 13}, 100_000, 611),  # 604
        ({"num_speculative_tokens": 100}, 100_000, 880),  # 512 + 256 + 101 = 869
        ({}, 300, 320),  # a context of 300 and 5
        ({"eviction_policy": "keep_all"}, 300, 320),
        ({"eviction_policy": "keep_all"}, 100_000, 100_016),
        ({"eviction_policy": "keep_all", "kv_budget": 1}, 4_096, 4_112),
    ],
)
def test_cache_capacity_is_what_is_kept_and_the_draft_slots_in_whole_pages(
    changes, max_model_len, capacity
):
    assert settings(**changes).cache_capacity(max_model_len) == capacity


def test_a_request_with_a_smaller_budget_takes_as_much_less_cache():
    assert settings().cache_capacity(100_000, budget=128) == 400  # 128 + 256 + 5


# By hand: all of the context, or the budget and a chunk.
@pytest.mark.parametrize(
    ("changes", "max_model_len", "tokens"),
    [
        ({"draft_prefill": "full"}, 100_000, 100_000),
        ({"draft_prefill": "streaming"}, 100_000, 4_608),
        ({"draft_prefill": "streaming"}, 3_000, 3_000),
        ({"draft_prefill": "streaming", "draft_prefill_chunk": 88}, 100_000, 600),
        (
            {"draft_prefill": "streaming", "position_mode": "cache_relative"},
            100_000,
            2_048,
        ),
        ({"draft_prefill": "streaming", "eviction_policy": "keep_all"}, 9_000, 9_000),
    ],
)
def test_a_prompt_holds_all_of_itself_or_what_streaming_does(
    changes, max_model_len, tokens
):
    config = settings(**changes)
    assert config.held_tokens(max_model_len, native_tokens=2_048) == tokens


def test_a_request_asks_for_less_or_for_nothing():
    asked = parse_request_settings(
        {"kv_budget": 16, "num_speculative_tokens": 0, "of_others": "x"}, settings()
    )
    assert asked == RequestSettings(kv_budget=16, num_speculative_tokens=0)
    assert parse_request_settings(None, settings()) == RequestSettings()
    most = {"kv_budget": "512", "num_speculative_tokens": 4}
    assert parse_request_settings(most, settings()).kv_budget == 512


@pytest.mark.parametrize(
    ("extra_args", "changes", "mentions"),
    [
        ({"kv_budget": 513}, {}, ["kv_budget=513", "16 to 512"]),
        ({"kv_budget": 15}, {}, ["kv_budget=15", "16 to 512"]),
        ({"kv_budget": "many"}, {}, ["kv_budget='many'", "valid integer"]),
        ({"kv_budget": [1, 2]}, {}, ["kv_budget=[1, 2]", "valid integer"]),
        ({"num_speculative_tokens": 5}, {}, ["num_speculative_tokens=5", "0 to 4"]),
        ({"num_speculative_tokens": -1}, {}, ["num_speculative_tokens=-1", "0 to 4"]),
        ({"num_speculative_tokens": 1.5}, {}, ["num_speculative_tokens=1.5"]),
        (
            {"kv_budget": 64},
            {"eviction_policy": "keep_all"},
            ["kv_budget=64", "keep_all", "leave it out"],
        ),
    ],
)
def test_what_a_request_may_not_ask_for_is_refused_with_value_and_limit(
    extra_args, changes, mentions
):
    with pytest.raises(ConfigurationError) as refusal:
        parse_request_settings(extra_args, settings(**changes))
    for part in ("vllm_xargs", *mentions):
        assert part in str(refusal.value)


def test_cache_capacity_does_not_grow_with_the_context():
    config = settings()
    assert config.cache_capacity(1_000) == config.cache_capacity(1_000_000)


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_a_key_of_another_method_is_refused_with_what_to_do(key):
    with pytest.raises(ConfigurationError) as refusal:
        settings(**{key: 1})
    assert f"{key}=1: {FOREIGN_KEYS[key]}" in str(refusal.value)


def test_no_key_of_ours_is_of_another_method():
    assert not FOREIGN_KEYS.keys() & BudgetDraftConfig.model_fields.keys()


@pytest.mark.parametrize("value", ["512", 512.0, True, None, [512]])
def test_what_is_no_whole_number_is_not_taken_for_one(value):
    with pytest.raises(ConfigurationError, match="it must be a whole number"):
        settings(kv_budget=value)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_budget": 10**9},
        {"recent_window": 10**9},
        {"page_size": 10**9},
        {"chunk_size": 10**9},
        {"draft_prefill_chunk": 10**9},
        {"pool_memory_gib": float("inf")},
        {"pool_memory_gib": float("nan")},
    ],
)
def test_sizes_that_nobody_can_mean_are_refused(changes):
    (name,) = changes
    with pytest.raises(ConfigurationError, match=f"{name}="):
        settings(**changes)


def test_a_long_value_is_not_said_whole():
    with pytest.raises(ConfigurationError) as refusal:
        settings(eviction_policy="x" * 200_000, kv_budget="y" * 200_000)
    assert len(str(refusal.value)) < 1000
    for value in ("z" * 200_000, 10**4000):
        with pytest.raises(ConfigurationError) as refusal:
            parse_request_settings({"kv_budget": value}, settings())
        assert len(str(refusal.value)) < 1000


def test_a_long_key_is_not_said_whole():
    with pytest.raises(ConfigurationError, match="unknown key 'xxx") as refusal:
        settings(**{"x" * 5000: 1})
    assert len(str(refusal.value)) < 1500


def test_of_many_mistakes_the_first_are_explained_and_known_keys_once():
    with pytest.raises(ConfigurationError) as refusal:
        settings(**{f"key_{index}": "long" * 1000 for index in range(40)})
    message = str(refusal.value)
    assert "unknown key 'key_7'" in message and "and 32 more" in message
    assert message.count("known keys: ") == 1 and len(message) < 3000


def test_a_key_that_is_no_text_is_named():
    with pytest.raises(ConfigurationError, match=r"unknown key '\\ud800'"):
        settings(**{"\ud800": 1})
    asked = parse_request_settings({"\ud800": 1, "kv_budget": 64}, settings())
    assert asked.kv_budget == 64  # what others call theirs is not read


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("adaptive_draft_length", 1, "'auto', true or false"),
        ("adaptive_draft_length", "true", "'auto', true or false"),
        ("draft_confidence_threshold", "0.25", "a number, as 0.5 is"),
        ("draft_confidence_threshold", False, "a number, as 0.5 is"),
        ("pool_memory_gib", "1", "a number, as 0.5 is"),
        ("num_speculative_tokens_per_batch_size", [[1, "8", 4]], "in whole numbers"),
        ("num_speculative_tokens_per_batch_size", [[True, 8, 4]], "in whole numbers"),
        ("num_speculative_tokens_per_batch_size", [[1, 8.0, 4]], "in whole numbers"),
    ],
)
def test_what_is_of_another_type_is_not_taken_for_a_value(name, value, wanted):
    with pytest.raises(ConfigurationError, match=f"{name}=.*{wanted}"):
        settings(**{name: value})
