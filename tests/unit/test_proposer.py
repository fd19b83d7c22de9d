"""Drafting, with the verification played by the test."""

from random import Random

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.support import models
from tests.support.drafting import (
    Requests,
    build_proposer,
    held_by,
    ingested,
    is_greedy,
)
from tests.support.policies import EVERY_SECOND
from tests.support.slow_twin import SlowTwin
from vllm_budgetdraft.errors import ConfigurationError, UnsupportedDrafterError
from vllm_budgetdraft.eviction.base import PromptStates
from vllm_budgetdraft.proposer.warm_up import warm_up

PROMPT_TOKENS = [2, 3, 17, 300]


@pytest.mark.parametrize(
    "settings",
    [
        {"eviction_policy": "keep_all"},
        {"eviction_policy": "keep_all", "draft_prefill_chunk": 7, "page_size": 8},
        {"eviction_policy": "chunk_retrieval", "kv_budget": 512},
        {"eviction_policy": "sink_window", "kv_budget": 512, "page_size": 24},
        {"eviction_policy": "keep_all", "num_speculative_tokens": 1},
    ],
    ids=["keep_all", "small_chunks", "chunk_retrieval", "sink_window", "one_draft"],
)
def test_drafts_from_a_cache_that_holds_everything_are_greedy_generation(
    drafter_folder, hugging_face_drafter, settings
):
    proposer = build_proposer(drafter_folder, num_slots=4, **settings)
    requests = Requests(proposer)
    for slot, prompt_tokens in enumerate(PROMPT_TOKENS):
        requests.start(slot, prompt_tokens, seed=slot)
    rng, seen = Random(0), set()
    for _ in range(12):
        batch = rng.sample(range(4), rng.randint(1, 4))
        for slot, drafts in requests.draft(batch).items():
            context = requests.contexts[slot]
            assert is_greedy(hugging_face_drafter, context, drafts), (slot, context)
            requests.verify(slot, drafts)
            seen.update(drafts)
        proposer.cache.check_invariants()
    assert len(seen) > 10, "the model repeats itself and tells nothing"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_drafts_what_it_would_generate(family, tmp_path):
    folder = models.write_model(tmp_path, getattr(models, family)())
    proposer = build_proposer(folder, eviction_policy="keep_all")
    requests = Requests(proposer)
    requests.start(0, 40)
    for _ in range(3):
        drafts = requests.draft([0])[0]
        assert is_greedy(models.read_model(folder), requests.contexts[0], drafts)
        requests.verify(0, drafts)


SMALL_BUDGETS = {
    "chunk_retrieval": {"kv_budget": 40},
    "odd_sizes": {"kv_budget": 45, "page_size": 7, "recent_window": 23},
    "drafts_longer_than_a_page": {"num_speculative_tokens": 11, "recent_window": 27},
    "drafts_as_long_as_a_page": {"num_speculative_tokens": 8, "recent_window": 24},
    "one_draft_and_pages_of_one": {"num_speculative_tokens": 1, "page_size": 1},
    "sink_window": {"eviction_policy": "sink_window"},
    "of_the_user": {"eviction_policy": EVERY_SECOND},
    "heavy_hitter": {"eviction_policy": "heavy_hitter"},
    "heavy_hitter_in_pages_of_one": {"eviction_policy": "heavy_hitter", "page_size": 1},
}
RELATIVE = {"position_mode": "cache_relative", "draft_prefill_chunk": 64}
SMALL_BUDGETS |= {
    f"relative_{name}": SMALL_BUDGETS[name] | RELATIVE
    for name in ("chunk_retrieval", "odd_sizes", "sink_window", "heavy_hitter")
}


@pytest.mark.parametrize("changes", SMALL_BUDGETS.values(), ids=SMALL_BUDGETS.keys())
def test_drafts_beyond_the_budget_equal_those_over_an_explicit_list_of_keys(
    drafter_folder, hugging_face_drafter, changes
):
    settings = {
        "num_speculative_tokens": 3,
        "kv_budget": 40,
        "page_size": 8,
        "recent_window": 20,
        **changes,
    }
    max_model_len = 1000
    proposer = build_proposer(
        drafter_folder, num_slots=4, max_model_len=max_model_len, **settings
    )
    config, cache = proposer.config, proposer.cache
    requests, twins = Requests(proposer), []
    for slot, prompt_tokens in enumerate(PROMPT_TOKENS):
        requests.start(slot, prompt_tokens, seed=slot)
        twins.append(
            SlowTwin(hugging_face_drafter, proposer.policy, config, max_model_len)
        )
        twins[slot].ingest(torch.tensor(requests.contexts[slot][:-2]))

    differs_from_full = False
    goal = PROMPT_TOKENS[0] + 5 * config.recent_window
    while len(requests.contexts[0]) < goal:
        for slot, drafts in requests.draft([2, 0, 3, 1]).items():
            context = requests.contexts[slot]
            assert drafts == twins[slot].draft(context), (slot, len(context))
            written = len(context) + len(drafts) - 1 - int(cache.num_evicted[slot])
            assert written <= cache.capacity
            if not is_greedy(hugging_face_drafter, context, drafts):
                differs_from_full = True
            requests.verify(slot, drafts)
        cache.check_invariants()
    assert all(twin.num_evicted for twin in twins)
    assert differs_from_full, "the budget was too large to matter"


@pytest.mark.parametrize("position_mode", ["absolute", "cache_relative"])
@pytest.mark.parametrize(
    "policy", ["chunk_retrieval", "heavy_hitter", "sink_window", EVERY_SECOND]
)
def test_a_prompt_read_streaming_never_holds_more_than_budget_and_chunk(
    drafter_folder, hugging_face_drafter, policy, position_mode
):
    proposer = build_proposer(
        drafter_folder,
        max_model_len=1000,
        eviction_policy=policy,
        draft_prefill="streaming",
        draft_prefill_chunk=50,
        position_mode=position_mode,
        kv_budget=40,
        page_size=8,
        recent_window=20,
    )
    assert proposer.reader.prompt.max_tokens == 40 + 50
    requests = Requests(proposer)
    twin = SlowTwin(hugging_face_drafter, proposer.policy, proposer.config, 1000)
    requests.start(0, 700)
    twin.ingest(torch.tensor(requests.contexts[0][:-2]))
    assert int(proposer.cache.num_evicted[0]) == twin.num_evicted >= 698 - 40
    for _ in range(8):
        drafts = requests.draft([0])[0]
        assert drafts == twin.draft(requests.contexts[0])
        requests.verify(0, drafts)


def test_streaming_keeps_everything_for_keep_all_and_for_prompts_within_the_budget(
    drafter_folder, hugging_face_drafter
):
    for settings in ({"eviction_policy": "keep_all"}, {"kv_budget": 400}):
        proposer = build_proposer(
            drafter_folder,
            draft_prefill="streaming",
            draft_prefill_chunk=50,
            **settings,
        )
        requests = Requests(proposer)
        requests.start(0, 300)
        drafts = requests.draft([0])[0]
        assert is_greedy(hugging_face_drafter, requests.contexts[0], drafts)


def test_drafts_do_not_depend_on_who_else_is_in_the_batch(drafter_folder):
    settings = {"kv_budget": 40, "page_size": 8, "recent_window": 20}

    def history(slots: list[int]) -> dict[int, list[list[int]]]:
        proposer = build_proposer(drafter_folder, num_slots=4, **settings)
        requests = Requests(proposer)
        for slot in slots:
            requests.start(slot, PROMPT_TOKENS[slot], seed=slot)
        rounds = {slot: [] for slot in slots}
        for _ in range(25):
            for slot, drafts in requests.draft(slots).items():
                rounds[slot].append(drafts)
                requests.verify(slot, drafts)
        return rounds

    together = history([3, 0, 2, 1])
    for slot in range(4):
        assert history([slot])[slot] == together[slot]


def test_a_slot_drafts_for_its_next_request_as_if_new(
    drafter_folder, hugging_face_drafter
):
    proposer = build_proposer(drafter_folder, eviction_policy="keep_all")
    requests = Requests(proposer)
    for seed, prompt_tokens in enumerate([60, 2, 33]):
        requests.start(0, prompt_tokens, seed=seed)
        for _ in range(2):
            drafts = requests.draft([0])[0]
            assert is_greedy(hugging_face_drafter, requests.contexts[0], drafts)
            requests.verify(0, drafts)
        requests.release(0)
    assert proposer.cache.pool.num_free == proposer.cache.pool.num_pages


def test_a_request_that_comes_back_goes_on_as_if_it_had_stayed(
    drafter_folder, hugging_face_drafter
):
    proposer = build_proposer(drafter_folder, eviction_policy="keep_all")
    requests = Requests(proposer)
    requests.start(0, 50)
    requests.verify(0, requests.draft([0])[0])
    context = requests.contexts[0]
    requests.release(0)
    ingested(proposer, torch.tensor(context[:-2]))
    requests.contexts[0] = context
    assert is_greedy(hugging_face_drafter, context, requests.draft([0])[0])


@pytest.mark.parametrize("policy", ["keep_all", "chunk_retrieval"])
def test_drafting_works_up_to_the_last_token_of_the_longest_context(
    drafter_folder, hugging_face_drafter, policy
):
    proposer = build_proposer(
        drafter_folder, max_model_len=61, eviction_policy=policy, page_size=8
    )
    requests = Requests(proposer)
    requests.start(0, 55)
    for _ in range(6):
        drafts = requests.draft([0])[0]
        assert is_greedy(hugging_face_drafter, requests.contexts[0], drafts)
        requests.contexts[0].append(7)
    assert len(requests.contexts[0]) == 61


@pytest.mark.parametrize("chunk", [7, 1024])
def test_queries_that_score_chunks_are_the_last_of_the_whole_prompt(
    drafter_folder, hugging_face_drafter, chunk
):
    proposer = build_proposer(
        drafter_folder,
        chunk_score="last_queries",
        observation_tokens=10,
        kv_budget=40,
        draft_prefill_chunk=chunk,
    )
    tokens = models.random_tokens(150)
    ingested(proposer, tokens)

    keys, queries = keys_and_queries(hugging_face_drafter, tokens)
    last = queries[:, :, -10:].unflatten(1, (2, 3))
    kept = proposer.policy.select(PromptStates(keys, last), 40)
    expected = keys.gather(2, kept[..., None].expand(-1, -1, -1, keys.shape[-1]))
    held, _ = held_by(proposer, 0, kept.shape[-1])
    torch.testing.assert_close(held.transpose(1, 2), expected, rtol=0, atol=1e-4)
    by_key = build_proposer(drafter_folder, kv_budget=40).policy
    by_key = by_key.select(PromptStates(keys), 40)
    assert not torch.equal(kept, by_key), "both scores agree, so nothing was tested"


@pytest.mark.parametrize("chunk", [100, 300, 600, 4096])
def test_a_prompt_in_chunks_has_the_keys_of_the_prompt_in_one(
    drafter_folder, hugging_face_drafter, chunk
):
    """700 tokens: chunks smaller and larger than a block of masked rows (256)."""
    proposer = build_proposer(
        drafter_folder,
        eviction_policy="keep_all",
        draft_prefill_chunk=chunk,
        max_model_len=1000,
    )
    tokens = models.random_tokens(700)
    ingested(proposer, tokens)
    held, _ = held_by(proposer, 0, len(tokens))
    expected, _ = keys_and_queries(hugging_face_drafter, tokens)
    torch.testing.assert_close(held.transpose(1, 2), expected, rtol=0, atol=1e-4)


def keys_and_queries(model, tokens):
    """Rotated keys [layers, G, T, D] and queries [layers, H, T, D] of a prompt."""
    raw, hooks = [], []
    for layer in model.model.layers:
        hooks.append(
            layer.self_attn.q_proj.register_forward_hook(
                lambda module, inputs, output: raw.append(output)
            )
        )
    cache = DynamicCache()
    with torch.inference_mode():
        model(tokens[None], past_key_values=cache)
        cos_sin = model.model.rotary_emb(raw[0], torch.arange(len(tokens))[None])
        queries = [
            q.unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2) for q in raw
        ]
        queries = [apply_rotary_pos_emb(q, q, *cos_sin)[0][0] for q in queries]
    for hook in hooks:
        hook.remove()
    return torch.stack([layer.keys[0] for layer in cache.layers]), torch.stack(queries)


@pytest.mark.parametrize("chunk", [1, 2, 3, 1024])
@pytest.mark.parametrize("policy", ["keep_all", "chunk_retrieval"])
def test_warming_up_leaves_no_trace(
    drafter_folder, hugging_face_drafter, chunk, policy
):
    proposer = build_proposer(
        drafter_folder, eviction_policy=policy, draft_prefill_chunk=chunk
    )
    warm_up(proposer)
    proposer.cache.check_invariants()
    assert proposer.cache.pool.num_free == proposer.cache.pool.num_pages
    requests = Requests(proposer)
    requests.start(0, 20)
    drafts = requests.draft([0])[0]
    assert is_greedy(hugging_face_drafter, requests.contexts[0], drafts)


def test_an_engine_too_short_for_a_draft_starts_nevertheless(drafter_folder):
    """It generates no token after which there would be room for one."""
    warm_up(build_proposer(drafter_folder, max_model_len=1))


def test_an_unusable_drafter_or_policy_is_refused_before_anything_is_allocated(
    drafter_folder, tmp_path
):
    with pytest.raises(UnsupportedDrafterError, match=r"holds no config\.json"):
        build_proposer(tmp_path)
    with pytest.raises(ConfigurationError, match="nowhere:Policy"):
        build_proposer(drafter_folder, eviction_policy="nowhere:Policy")
