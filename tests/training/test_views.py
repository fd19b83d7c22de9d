"""Training sees what serving sees."""

import pytest
import torch

from tests.support import models
from tests.support.drafting import build_proposer, held_by, ingested
from tests.support.policies import EVERY_SECOND
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.training.views import continuation_hidden, read_prefix

BUDGET = 64
SETTINGS = {
    "chunk_retrieval": {},
    "chunk_retrieval_by_queries": {"chunk_score": "last_queries"},
    "observation_window": {"eviction_policy": "observation_window"},
    "heavy_hitter": {"eviction_policy": "heavy_hitter"},
    "sink_window": {"eviction_policy": "sink_window"},
    "keep_all": {"eviction_policy": "keep_all"},
    "of_the_user": {"eviction_policy": EVERY_SECOND},
}
KEEP_ALL = make_policy(EvictionSettings(eviction_policy="keep_all"))
OBSERVING = make_policy(EvictionSettings(chunk_score="last_queries"))
every_policy = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def drafter(drafter_folder):
    """A drafter to train."""
    drafter = load_drafter(drafter_folder, max_positions=512)
    return drafter.train().requires_grad_(True)


def read_both(drafter, drafter_folder, prefixes, settings):
    """What training and what serving keep of the same prefixes [B, P]."""
    proposer = build_proposer(
        drafter_folder,
        num_slots=len(prefixes),
        kv_budget=BUDGET,
        draft_prefill_chunk=50,
        **settings,
    )
    for slot, tokens in enumerate(prefixes):
        ingested(proposer, tokens, slot)
    policy = make_policy(proposer.config)
    prefix = read_prefix(drafter, prefixes, policy)
    return prefix.sparse(policy, BUDGET), proposer


@every_policy
@pytest.mark.parametrize("prefix_tokens", [40, 301])
def test_training_keeps_the_same_keys_and_values_as_serving(
    drafter, drafter_folder, settings, prefix_tokens
):
    prefixes = models.random_tokens(2 * prefix_tokens).view(2, prefix_tokens)
    view, proposer = read_both(drafter, drafter_folder, prefixes, settings)
    for slot in range(2):
        assert view.num_tokens + int(proposer.cache.num_evicted[slot]) == prefix_tokens
        for ours, theirs in zip(
            (view.keys, view.values),
            held_by(proposer, slot, view.num_tokens),
            strict=True,
        ):
            trained = torch.stack([layer[slot] for layer in ours]).transpose(1, 2)
            # Serving reads in chunks; nothing else may differ.
            torch.testing.assert_close(trained, theirs, rtol=0, atol=1e-4)


@every_policy
def test_training_predicts_from_a_sparse_view_what_serving_drafts(
    drafter, drafter_folder, settings
):
    contexts = models.random_tokens(2 * 302).view(2, 302)
    prefixes, last = contexts[:, :-2], contexts[:, -2:]
    view, proposer = read_both(drafter, drafter_folder, prefixes, settings)
    ends = torch.tensor([302, 302])
    drafts = proposer.draft(torch.arange(2), last, ends).tokens.clone()

    fed = torch.cat([last, drafts[:, :-1]], 1)
    logits = drafter.logits(continuation_hidden(drafter, fed, 300, view))
    assert torch.equal(logits[:, 1:].argmax(-1), drafts)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 100])
def test_the_full_view_is_a_plain_forward_pass(
    drafter, hugging_face_drafter, prefix_tokens
):
    tokens = models.random_tokens(2 * 130).view(2, 130)
    prefix = read_prefix(drafter, tokens[:, :prefix_tokens], KEEP_ALL)
    hidden = continuation_hidden(
        drafter, tokens[:, prefix_tokens:], prefix_tokens, prefix
    )
    expected = hugging_face_drafter(tokens).logits[:, prefix_tokens:]
    assert (drafter.logits(hidden) - expected).abs().max() < 1e-4


def test_a_sparse_view_leaves_the_full_one_as_it_was(drafter):
    tokens = models.random_tokens(200)[None]
    prefix = read_prefix(drafter, tokens, KEEP_ALL)
    before = [keys.clone() for keys in prefix.keys]
    prefix.sparse(make_policy(EvictionSettings()), BUDGET)
    assert all(map(torch.equal, prefix.keys, before))


def test_gradients_reach_every_parameter_through_the_continuation_alone(drafter):
    tokens = models.random_tokens(130)[None]
    prefix = read_prefix(drafter, tokens[:, :100], OBSERVING)
    for tensors in (prefix.keys, prefix.values, prefix.queries):
        assert len(tensors) == drafter.num_layers
        assert not any(tensor.requires_grad for tensor in tensors)

    hidden = continuation_hidden(drafter, tokens[:, 100:], 100, prefix)
    drafter.logits(hidden).square().mean().backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    unread = sorted(set(range(models.VOCAB_SIZE)) - set(tokens[0, 100:].tolist()))
    assert not drafter.embedding.grad[unread].any()
