import sys

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import reference
from tests.support.policies import EVERY_SECOND, EverySecond
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.eviction.base import (
    EvictionPolicy,
    PromptStates,
    check_selection,
)
from vllm_budgetdraft.eviction.catalogue import POLICIES, make_policy

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 2, 3, 2, 10

SETTINGS = {
    "chunk_retrieval": {},
    "chunk_retrieval_without_local": {"local_tokens": 0},
    "chunk_retrieval_of_odd_chunks": {"chunk_size": 5, "sink_tokens": 13},
    "chunk_retrieval_without_sinks": {"sink_tokens": 0},
    "chunk_retrieval_by_queries": {"chunk_score": "last_queries"},
    "observation_window": {"eviction_policy": "observation_window"},
    "observation_window_wide": {
        "eviction_policy": "observation_window",
        "observation_tokens": 64,
        "pooling_size": 1,
        "sink_tokens": 0,
    },
    "heavy_hitter": {"eviction_policy": "heavy_hitter"},
    "heavy_hitter_without_sinks": {"eviction_policy": "heavy_hitter", "sink_tokens": 0},
    "last_query": {"eviction_policy": "last_query"},
    "last_query_without_sinks": {"eviction_policy": "last_query", "sink_tokens": 0},
    "key_diversity": {"eviction_policy": "key_diversity"},
    "key_diversity_without_local": {
        "eviction_policy": "key_diversity",
        "local_tokens": 0,
    },
    "sink_window": {"eviction_policy": "sink_window"},
    "sink_window_without_sinks": {"eviction_policy": "sink_window", "sink_tokens": 0},
    "keep_all": {"eviction_policy": "keep_all"},
}
every_setting = pytest.mark.parametrize(
    "settings",
    [EvictionSettings(**settings) for settings in SETTINGS.values()],
    ids=SETTINGS.keys(),
)


def random_prompt(
    num_tokens: int, policy: EvictionPolicy, seed: int = 0
) -> PromptStates:
    """Keys [layers, KV heads, tokens, D], and what else the policy goes by."""
    torch.manual_seed(seed)
    heads = (LAYERS, KV_HEADS)
    keys = torch.randn(*heads, num_tokens, HEAD_DIM)
    queries = attention = None
    if policy.observation_tokens:
        num_queries = min(policy.observation_tokens, num_tokens)
        queries = torch.randn(*heads, GROUP, num_queries, HEAD_DIM)
    if policy.accumulates_attention:
        attention = torch.rand(*heads, num_tokens)
    return PromptStates(keys, queries, attention)


def of_head(states: PromptStates, *index: int) -> PromptStates:
    everything = (states.keys, states.queries, states.received)
    return PromptStates(*(None if x is None else x[index] for x in everything))


def select(settings: EvictionSettings, num_tokens: int, budget: int) -> Tensor:
    policy = make_policy(settings)
    return policy.select(random_prompt(num_tokens, policy), budget)


def test_every_built_in_policy_is_in_the_matrix():
    tested = {EvictionSettings(**s).eviction_policy for s in SETTINGS.values()}
    assert tested == set(POLICIES)


@every_setting
@pytest.mark.parametrize("num_tokens", [1, 7, 63, 100, 513, 4001])
@pytest.mark.parametrize("above_minimum", [0, 1, 9, 47, 240, 497])
def test_kept_positions_ascend_and_fit_the_budget(settings, num_tokens, above_minimum):
    budget = settings.min_budget + above_minimum
    kept = select(settings, num_tokens, budget)
    assert kept.dtype == torch.int64
    assert kept.shape[:2] == (LAYERS, KV_HEADS)
    assert (kept.diff() > 0).all()
    assert kept.min() >= 0 and kept.max() < num_tokens
    if settings.eviction_policy == "keep_all" or num_tokens <= budget:
        assert kept.shape[2] == num_tokens
    else:
        # Whole chunks are kept, so that up to one chunk of the budget is unused.
        assert budget - settings.chunk_size < kept.shape[2] <= budget
        assert (kept[..., : settings.sink_tokens] < settings.sink_tokens).all()


@every_setting
def test_as_many_are_kept_whatever_the_keys(settings):
    policy = make_policy(settings)
    counts = {
        policy.select(random_prompt(777, policy, seed), 200).shape for seed in range(5)
    }
    assert len(counts) == 1


@every_setting
def test_a_head_is_served_alike_alone_and_among_others(settings):
    policy = make_policy(settings)
    states = random_prompt(777, policy)
    together = policy.select(states, 200)
    for head in range(KV_HEADS):
        alone = policy.select(of_head(states, 1, head), 200)
        assert torch.equal(alone, together[1, head])


def slow_attention(keys: Tensor, queries: Tensor) -> Tensor:
    """What keys [num_tokens, D] are given by queries of the last tokens, [heads, n, D].

    Each sees the keys up to its own.
    """
    weights = torch.zeros(len(keys))
    for head in queries:
        for back, query in enumerate(head.flip(0)):
            seen = len(keys) - back
            logits = torch.stack([query @ key for key in keys[:seen]]) / HEAD_DIM**0.5
            weights[:seen] += logits.exp() / logits.exp().sum()
    return weights


def slow_chunk_retrieval(
    keys: Tensor,
    queries: Tensor | None,
    *,
    budget: int,
    sinks: int,
    local: int,
    size: int = 8,
) -> list[int]:
    """Positions that one head keeps of keys [num_tokens, D], spelled out."""
    num_tokens = len(keys)
    # The local window holds whole chunks, half of what the sinks leave at most.
    local = min(local, (budget - sinks) // 2) // size * size
    chunks = []
    start = sinks
    while start + size <= num_tokens - local:
        chunks.append(list(range(start, start + size)))
        start += size
    tail = list(range(start, num_tokens))

    if queries is None:
        scores = [float(keys[chunk].mean(0) @ keys[-1]) for chunk in chunks]
    else:
        weights = slow_attention(keys, queries)
        scores = [float(weights[chunk].sum()) for chunk in chunks]
    room = (budget - sinks - len(tail)) // size
    best = sorted(range(len(chunks)), key=lambda i: scores[i])[len(chunks) - room :]
    chosen = [position for i in sorted(best) for position in chunks[i]]
    return [*range(sinks), *chosen, *tail]


@pytest.mark.parametrize("score", ["last_key", "last_queries"])
@pytest.mark.parametrize(
    ("num_tokens", "budget", "sink_tokens", "sinks", "local"),
    [
        (100, 64, 8, 8, 16),
        (101, 64, 8, 8, 16),
        (107, 63, 8, 8, 100),
        (167, 90, 9, 16, 64),
        (65, 64, 8, 8, 0),
        (200, 17, 8, 8, 64),
        (90, 50, 0, 0, 8),
    ],
)
def test_chunk_retrieval_keeps_what_its_description_says(
    score, num_tokens, budget, sink_tokens, sinks, local
):
    policy = make_policy(
        EvictionSettings(chunk_score=score, sink_tokens=sink_tokens, local_tokens=local)
    )
    states = random_prompt(num_tokens, policy)
    keys, queries = states.keys, states.queries
    kept = policy.select(states, budget)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            expected = slow_chunk_retrieval(
                keys[layer, head],
                None if queries is None else queries[layer, head],
                budget=budget,
                sinks=sinks,
                local=local,
            )
            assert kept[layer, head].tolist() == expected


@pytest.mark.parametrize("score", ["last_key", "last_queries"])
def test_chunk_retrieval_keeps_the_first_chunk_however_badly_it_scores(score):
    policy = make_policy(EvictionSettings(chunk_score=score))
    states = random_prompt(400, policy)
    keys, queries = states.keys, states.queries
    keys[..., :8, :] = -100 * keys[..., -1:, :]
    if queries is not None:
        queries[:] = keys[..., None, -1:, :]
    kept = policy.select(states, 64)
    assert torch.equal(kept[..., :8], torch.arange(8).expand(LAYERS, KV_HEADS, -1))


@pytest.mark.parametrize("score", ["last_key", "last_queries"])
def test_chunk_retrieval_keeps_for_each_head_the_chunk_that_it_looks_for(score):
    policy = make_policy(EvictionSettings(chunk_score=score))
    states = random_prompt(400, policy)
    keys, queries = states.keys, states.queries
    wanted = torch.tensor([[5, 17, 30], [8, 9, 40]])
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            start = 8 * int(wanted[layer, head])
            keys[layer, head, start : start + 8] = 5 * keys[layer, head, -1]
            if queries is not None:
                queries[layer, head] = keys[layer, head, -1]
    kept = policy.select(states, 32)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            start = 8 * int(wanted[layer, head])
            chunk = set(range(start, start + 8))
            assert chunk <= set(kept[layer, head].tolist())


def test_chunk_retrieval_gives_local_tokens_at_most_half_of_what_the_sinks_leave():
    kept = select(EvictionSettings(local_tokens=1000), 800, budget=8 + 64)[0, 0]
    assert kept[-32:].tolist() == list(range(768, 800))
    assert kept[-33] < 760


def slow_observation_window(
    keys: Tensor, queries: Tensor, *, budget: int, sinks: int, window: int, pooling: int
) -> list[int]:
    """Positions that one head keeps of keys [num_tokens, D], spelled out."""
    before = len(keys) - window
    weights = slow_attention(keys, queries)[:before]
    reach = pooling // 2
    scores = {
        position: float(weights[max(0, position - reach) : position + reach + 1].mean())
        for position in range(sinks, before)
    }
    best = sorted(scores, key=lambda position: -scores[position])
    chosen = sorted(best[: budget - sinks - window])
    return [*range(sinks), *chosen, *range(before, len(keys))]


@pytest.mark.parametrize(
    ("num_tokens", "budget", "sinks", "window", "pooling"),
    [(100, 64, 8, 16, 5), (65, 64, 0, 16, 1), (300, 40, 8, 16, 7), (63, 20, 8, 6, 3)],
)
def test_observation_window_keeps_what_its_description_says(
    num_tokens, budget, sinks, window, pooling
):
    policy = make_policy(
        EvictionSettings(
            eviction_policy="observation_window",
            sink_tokens=sinks,
            pooling_size=pooling,
        )
    )
    states = random_prompt(num_tokens, policy)
    keys, queries = states.keys, states.queries
    kept = policy.select(states, budget)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            assert kept[layer, head].tolist() == slow_observation_window(
                keys[layer, head],
                queries[layer, head],
                budget=budget,
                sinks=sinks,
                window=window,
                pooling=pooling,
            )


@pytest.mark.parametrize(
    ("num_tokens", "budget", "sinks"), [(100, 64, 8), (65, 64, 0), (900, 41, 9)]
)
def test_heavy_hitter_keeps_what_its_description_says(num_tokens, budget, sinks):
    policy = make_policy(
        EvictionSettings(eviction_policy="heavy_hitter", sink_tokens=sinks)
    )
    states = random_prompt(num_tokens, policy)
    kept = policy.select(states, budget)
    recent = (budget - sinks) // 2
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            received = states.received[layer, head].tolist()
            between = range(sinks, num_tokens - recent)
            best = sorted(between, key=lambda position: -received[position])
            heavy = sorted(best[: budget - sinks - recent])
            latest = range(num_tokens - recent, num_tokens)
            assert kept[layer, head].tolist() == [*range(sinks), *heavy, *latest]


@pytest.mark.parametrize(
    ("num_tokens", "budget", "sinks"), [(100, 64, 8), (65, 64, 0), (900, 41, 9)]
)
def test_last_query_keeps_what_its_description_says(num_tokens, budget, sinks):
    policy = make_policy(
        EvictionSettings(eviction_policy="last_query", sink_tokens=sinks)
    )
    states = random_prompt(num_tokens, policy)
    assert states.queries.shape[-2] == 1
    kept = policy.select(states, budget)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            queries = states.queries[layer, head, :, 0]  # of the heads that share it
            logits = queries @ states.keys[layer, head].T / HEAD_DIM**0.5
            weights = logits.softmax(-1).sum(0).tolist()
            others = range(sinks, num_tokens)
            best = sorted(others, key=lambda position: -weights[position])
            chosen = sorted(best[: budget - sinks])
            assert kept[layer, head].tolist() == [*range(sinks), *chosen]


@pytest.mark.parametrize(
    ("num_tokens", "budget", "sinks", "local"),
    [(100, 64, 8, 16), (65, 64, 0, 0), (900, 41, 9, 256)],
)
def test_key_diversity_keeps_what_its_description_says(
    num_tokens, budget, sinks, local
):
    policy = make_policy(
        EvictionSettings(
            eviction_policy="key_diversity", sink_tokens=sinks, local_tokens=local
        )
    )
    states = random_prompt(num_tokens, policy)
    kept = policy.select(states, budget)
    end = num_tokens - min(local, (budget - sinks) // 2)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            keys = states.keys[layer, head].double()
            directions = [key / key.norm() for key in keys]
            mean = sum(directions) / num_tokens
            cosines = [float(each @ mean / mean.norm()) for each in directions]
            best = sorted(range(sinks, end), key=lambda position: cosines[position])
            chosen = sorted(best[: budget - sinks - (num_tokens - end)])
            expected = [*range(sinks), *chosen, *range(end, num_tokens)]
            assert kept[layer, head].tolist() == expected


def test_sink_window_keeps_the_sinks_and_the_latest():
    settings = EvictionSettings(eviction_policy="sink_window", sink_tokens=4)
    expected = [0, 1, 2, 3, *range(1000 - 46, 1000)]
    assert select(settings, 1000, budget=50)[1, 2].tolist() == expected


def test_a_policy_of_the_user_is_built_with_the_settings():
    settings = EvictionSettings(eviction_policy=EVERY_SECOND, sink_tokens=3)
    policy = make_policy(settings)
    assert isinstance(policy, EverySecond)
    assert policy.settings == settings
    assert policy.operations is reference


@pytest.mark.parametrize(
    "name",
    [
        "no_such_package.policies:Mine",
        "tests.support.policies:NoSuchClass",
        "tests.support.policies:",
        ":EverySecond",
        ".policies:EverySecond",
    ],
)
def test_a_policy_that_cannot_be_imported_is_refused_by_name(name):
    with pytest.raises(ConfigurationError) as refusal:
        make_policy(EvictionSettings(eviction_policy=name))
    for part in (f"eviction_policy={name!r}", "keep_all", "package.module:Class"):
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "raise RuntimeError('on import')",
        "def broken(:",
        "import sys; sys.exit(3)",
        "from vllm_budgetdraft.eviction.base import EvictionPolicy as Mine",
        "from abc import abstractmethod\n"
        "from vllm_budgetdraft.eviction.base import EvictionPolicy\n"
        "class Mine(EvictionPolicy):\n    pass",
    ],
)
def test_a_module_that_holds_no_policy_is_refused(tmp_path, monkeypatch, text):
    (tmp_path / "of_a_user.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "of_a_user", raising=False)
    with pytest.raises(ConfigurationError, match="eviction_policy='of_a_user:Mine'"):
        make_policy(EvictionSettings(eviction_policy="of_a_user:Mine"))


def test_a_policy_that_is_none_is_refused():
    with pytest.raises(ConfigurationError) as refusal:
        make_policy(EvictionSettings(eviction_policy="builtins:dict"))
    for part in ("eviction_policy='builtins:dict'", "subclass", "EvictionPolicy"):
        assert part in str(refusal.value)


@every_setting
@pytest.mark.parametrize("num_tokens", [1, 100, 4001])
def test_what_need_not_be_read_is_never_kept(settings, num_tokens):
    policy, budget = make_policy(settings), 64
    unread = policy.unread(num_tokens, budget)
    if unread:
        assert unread.stop <= num_tokens
        kept = policy.select(random_prompt(num_tokens, policy), budget)
        assert not set(unread) & set(kept.flatten().tolist())
        assert len(unread) == num_tokens - budget


def positions(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)[None]


@pytest.mark.parametrize(
    ("kept", "mentions"),
    [
        (positions([0, 1], [0, 1]).int(), ["torch.int32", "int64"]),
        (positions([0, 1]), ["(1, 1, 2)", "(1, 2, 'num_kept')"]),
        (positions([], []).long(), ["kept 0", "1 to 4"]),
        (positions([*range(5)], [*range(5)]), ["kept 5", "1 to 4", "budget is 4"]),
        (positions([0, 1], [1, 1]), ["do not ascend"]),
        (positions([0, 1], [2, 1]), ["do not ascend"]),
        (positions([0, 1], [-1, 1]), ["from 0 to below 9"]),
        (positions([0, 1], [8, 9]), ["from 0 to below 9"]),
    ],
    ids=[
        "type",
        "shape",
        "none",
        "too_many",
        "twice",
        "unsorted",
        "negative",
        "beyond",
    ],
)
def test_a_selection_that_would_break_the_cache_is_refused(kept, mentions):
    states = PromptStates(torch.zeros(1, 2, 9, HEAD_DIM))
    check_selection(positions([0, 8], [3, 4]), states, budget=4)
    with pytest.raises(ValueError) as refusal:
        check_selection(kept, states, budget=4)
    for part in mentions:
        assert part in str(refusal.value)
