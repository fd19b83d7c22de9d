"""Training sees what serving sees."""

from random import Random

import pytest
import torch

from budgetdraft_kernels.reference import rotate
from tests.support import models
from tests.support.drafting import build_proposer, held_by, ingested, positions_of
from tests.support.policies import EVERY_SECOND, KEEPS_TOO_MUCH
from vllm_budgetdraft.config import EvictionSettings, ViewSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.training.views import PrefixViews, View, continuation_hidden

BUDGET, CHUNK = 64, 50
SETTINGS = {
    "chunk_retrieval": {},
    "chunk_retrieval_by_queries": {"chunk_score": "last_queries"},
    "observation_window": {"eviction_policy": "observation_window"},
    "last_query": {"eviction_policy": "last_query"},
    "key_diversity": {"eviction_policy": "key_diversity"},
    "heavy_hitter": {"eviction_policy": "heavy_hitter"},
    "sink_window": {"eviction_policy": "sink_window"},
    "keep_all": {"eviction_policy": "keep_all"},
    "of_the_user": {"eviction_policy": EVERY_SECOND},
}
OBSERVES = SETTINGS["observation_window"]
KEEP_ALL = make_policy(ViewSettings(eviction_policy="keep_all"))
every_policy = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
every_mode = pytest.mark.parametrize("position_mode", ["absolute", "cache_relative"])
every_prefill = pytest.mark.parametrize("draft_prefill", ["full", "streaming"])


@pytest.fixture
def drafter(drafter_folder):
    """A drafter to train."""
    drafter = load_drafter(drafter_folder, max_positions=512)
    return drafter.train().requires_grad_(True)


@torch.no_grad()
def views_of(drafter, prefixes, policy, position_mode="absolute", draft_prefill="full"):
    of_policy = policy.settings.model_dump(include=EvictionSettings.model_fields.keys())
    view = view_settings(position_mode, draft_prefill, **of_policy)
    return PrefixViews(drafter, policy, prefixes, view, continuation_tokens=1)


def view_settings(position_mode="absolute", draft_prefill="full", **more):
    return ViewSettings(
        position_mode=position_mode,
        draft_prefill=draft_prefill,
        draft_prefill_chunk=CHUNK,
        **more,
    )


def read_both(
    drafter, drafter_folder, prefixes, position_mode, draft_prefill, settings
):
    """What training and what serving keep of the same prefixes [B, P]."""
    proposer = build_proposer(
        drafter_folder,
        num_slots=len(prefixes),
        kv_budget=BUDGET,
        draft_prefill_chunk=CHUNK,
        position_mode=position_mode,
        draft_prefill=draft_prefill,
        **settings,
    )
    for slot, tokens in enumerate(prefixes):
        ingested(proposer, tokens, slot)
    policy = make_policy(proposer.config)
    views = views_of(drafter, prefixes, policy, position_mode, draft_prefill)
    with torch.no_grad():
        return views.sparse(BUDGET), proposer


@every_policy
@every_mode
@every_prefill
@pytest.mark.parametrize("prefix_tokens", [40, 301])
def test_training_keeps_the_same_keys_and_values_as_serving(
    drafter, drafter_folder, settings, prefix_tokens, position_mode, draft_prefill
):
    prefixes = models.random_tokens(2 * prefix_tokens).view(2, prefix_tokens)
    view, proposer = read_both(
        drafter, drafter_folder, prefixes, position_mode, draft_prefill, settings
    )
    is_relative = position_mode == "cache_relative"
    assert view.first_position == (view.num_tokens if is_relative else prefix_tokens)
    for slot in range(2):
        assert view.num_tokens + int(proposer.cache.num_evicted[slot]) == prefix_tokens
        keys, values = held_by(proposer, slot, view.num_tokens)
        if is_relative:  # which are stored as they are
            cos, sin = proposer.drafter.rotary(torch.arange(view.num_tokens))
            keys = rotate(keys, cos[:, None], sin[:, None])
        for ours, theirs in ((view.keys, keys), (view.values, values)):
            trained = torch.stack([layer[slot] for layer in ours]).transpose(1, 2)
            torch.testing.assert_close(trained, theirs, rtol=0, atol=1e-4)


@every_policy
@every_mode
@every_prefill
def test_training_predicts_from_a_sparse_view_what_serving_drafts(
    drafter, drafter_folder, settings, position_mode, draft_prefill
):
    contexts = models.random_tokens(2 * 302).view(2, 302)
    prefixes, last = contexts[:, :-2], contexts[:, -2:]
    view, proposer = read_both(
        drafter, drafter_folder, prefixes, position_mode, draft_prefill, settings
    )
    ends = torch.tensor([302, 302])
    drafts = proposer.draft(torch.arange(2), last, ends).tokens.clone()

    fed = torch.cat([last, drafts[:, :-1]], 1)
    (hidden,) = continuation_hidden(drafter, fed, [view])
    assert torch.equal(drafter.logits(hidden)[:, 1:].argmax(-1), drafts)


@every_mode
@pytest.mark.parametrize("prefix_tokens", [0, 1, 100])
def test_the_full_view_is_a_plain_forward_pass(
    drafter, hugging_face_drafter, prefix_tokens, position_mode
):
    tokens = models.random_tokens(2 * 130).view(2, 130)
    views = views_of(drafter, tokens[:, :prefix_tokens], KEEP_ALL, position_mode)
    (hidden,) = continuation_hidden(drafter, tokens[:, prefix_tokens:], [views.full()])
    expected = hugging_face_drafter(tokens).logits[:, prefix_tokens:]
    assert (drafter.logits(hidden) - expected).abs().max() < 1e-4


@every_mode
@every_prefill
def test_views_together_are_what_they_are_alone(drafter, position_mode, draft_prefill):
    tokens = models.random_tokens(2 * 230).view(2, 230)
    policy = make_policy(ViewSettings())
    found = views_of(drafter, tokens[:, :200], policy, position_mode, draft_prefill)
    with torch.no_grad():
        views = [found.sparse(90), found.full(), found.sparse(BUDGET)]
        together = continuation_hidden(drafter, tokens[:, 200:], views)
        for view, hidden in zip(views, together, strict=True):
            (alone,) = continuation_hidden(drafter, tokens[:, 200:], [view])
            torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5)
    assert [view.num_tokens for view in views] == [88, 200, BUDGET]


def test_sparse_views_leave_the_full_one_as_it_was(drafter):
    tokens = models.random_tokens(200)[None]
    views = views_of(drafter, tokens, make_policy(ViewSettings()))
    before = [keys.clone() for keys in views.full().keys]
    views.sparse(BUDGET)
    assert all(map(torch.equal, views.full().keys, before))


def backward(drafter, view: View, tokens, **changes) -> dict[str, torch.Tensor]:
    drafter.zero_grad()
    hidden = continuation_hidden(drafter, tokens, [view], **changes)
    drafter.logits(hidden).square().mean().backward()
    return {name: p.grad.clone() for name, p in drafter.named_parameters()}


def test_gradients_reach_every_parameter_through_the_continuation_alone(drafter):
    tokens = models.random_tokens(130)[None]
    policy = make_policy(ViewSettings(chunk_score="last_queries"))
    view = views_of(drafter, tokens[:, :100], policy).sparse(BUDGET)
    assert not any(x.requires_grad for x in (*view.keys, *view.values))
    gradients = backward(drafter, view, tokens[:, 100:])
    assert all(gradient.any() for gradient in gradients.values())
    unread = sorted(set(range(models.VOCAB_SIZE)) - set(tokens[0, 100:].tolist()))
    assert not gradients["embedding"][unread].any()


@every_mode
@pytest.mark.parametrize("settings", [{}, {"eviction_policy": "heavy_hitter"}])
def test_gradients_flow_through_the_prefix_if_they_are_wanted(
    drafter, position_mode, settings
):
    """Those of the full view are those of a plain forward pass."""
    tokens = models.random_tokens(130)[None]
    policy = make_policy(ViewSettings(**settings))

    def found() -> PrefixViews:
        return PrefixViews(
            drafter,
            policy,
            tokens[:, :100],
            view_settings(position_mode),
            continuation_tokens=30,
        )

    full = backward(drafter, found().full(), tokens[:, 100:])
    whole = continuation_hidden(drafter, tokens, [View([], [], 0)])[:, :, 100:]
    drafter.zero_grad()
    drafter.logits(whole).square().mean().backward()
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(full[name], parameter.grad, rtol=1e-3, atol=1e-6)
    sparse = backward(drafter, found().sparse(BUDGET), tokens[:, 100:])
    read = sorted(set(tokens[0, :100].tolist()) - set(tokens[0, 100:].tolist()))
    # All that was kept, and what it is made of; chunks leave some out.
    assert sparse["embedding"][read].any(-1).float().mean() > 0.5


def test_gradients_are_the_same_with_activations_computed_again(drafter):
    tokens = models.random_tokens(130)[None]
    view = views_of(drafter, tokens[:, :100], KEEP_ALL).full()
    kept = backward(drafter, view, tokens[:, 100:])
    again = backward(drafter, view, tokens[:, 100:], checkpoints=True)
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient)


def random_case(seed: int) -> dict:
    """A native range, and what fits into it."""
    rng = Random(seed)
    native = rng.choice([96, 128, 200, 512])
    budget = rng.randrange(24, native - 20)  # what is left for drafts and new tokens
    policy = rng.choice([name for name in SETTINGS if name != "keep_all"])
    return {
        "native": native,
        "budget": budget,
        "chunk": rng.choice([7, 30, 100, 4096]),
        "prefix_tokens": rng.randrange(1, 420),
        "settings": SETTINGS[policy],
        "seed": seed,
    }


@every_mode
@pytest.mark.parametrize(
    "case",
    [
        {"native": 128, "budget": 64, "chunk": 100, "prefix_tokens": 400, "seed": 0},
        {  # more tokens observe than are held
            **{"native": 200, "budget": 40, "chunk": 30, "prefix_tokens": 150},
            **{"seed": 1, "settings": {"observation_tokens": 100, **OBSERVES}},
        },
        *map(random_case, range(12)),
    ],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_training_reads_as_serving_whatever_is_read_at_once(
    tmp_path, case, position_mode
):
    """Engines give a reader as many tokens as they can; training gives all."""
    native, budget, rng = case["native"], case["budget"], Random(case["seed"])
    config = models.llama(max_position_embeddings=native)
    folder = models.write_model(tmp_path / "drafter", config, seed=3)
    settings = {"chunk_size": 4, "sink_tokens": 4, **case.get("settings", {})}
    view = ViewSettings(
        position_mode=position_mode,
        draft_prefill="streaming",
        draft_prefill_chunk=case["chunk"],
        **settings,
    )
    prefix = models.random_tokens(case["prefix_tokens"], seed=case["seed"])
    proposer = build_proposer(
        folder,
        kv_budget=budget,
        page_size=4,
        recent_window=12,
        **view.model_dump(),
    )
    proposer.start_reading(0, len(prefix))
    while proposer.reader.is_reading(0):
        assert not proposer.read([0], positions_of(prefix), rng.randint(1, 150))

    drafter = load_drafter(folder, max_positions=512)
    seen, rotary = [], drafter.rotary

    def watched(positions):
        seen.append(int(positions.max()))
        return rotary(positions)

    drafter.rotary = watched
    with torch.no_grad():
        views = PrefixViews(
            drafter, make_policy(view), prefix[None], view, continuation_tokens=20
        )
        sparse, full = views.sparse(budget), views.full()
    is_relative = position_mode == "cache_relative"
    assert sparse.num_tokens + int(proposer.cache.num_evicted[0]) == len(prefix)
    if is_relative:
        assert max(seen) < native
        assert full.first_position + 20 <= native
    else:
        assert full.num_tokens == len(prefix)
    keys, values = held_by(proposer, 0, sparse.num_tokens)
    if is_relative:
        cos, sin = rotary(torch.arange(sparse.num_tokens))
        keys = rotate(keys, cos[:, None], sin[:, None])
    for ours, theirs in ((sparse.keys, keys), (sparse.values, values)):
        trained = torch.stack([layer[0] for layer in ours]).transpose(1, 2)
        torch.testing.assert_close(trained, theirs, rtol=0, atol=1e-4)


def test_a_policy_that_keeps_too_much_is_refused_in_training_too(drafter_folder):
    drafter = load_drafter(drafter_folder, max_positions=801)
    policy = make_policy(ViewSettings(eviction_policy=KEEPS_TOO_MUCH))
    views = views_of(drafter, models.random_tokens(800)[None], policy)
    with pytest.raises(ValueError, match="positions that do not ascend"):
        views.sparse(BUDGET)
