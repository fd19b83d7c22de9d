"""Contexts that go on from what was kept of others: see ``SnapshotStore``."""

from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.drafting import build_proposer, held_by
from tests.support.policies import EVERY_SECOND
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.snapshots import Match

LONGEST = 300
SIZES = {
    # float64, so that a key tells whose it is.
    "dtype": torch.float64,
    "max_model_len": LONGEST,
    "kv_budget": 40,
    "page_size": 8,
    "recent_window": 32,
    "sink_tokens": 4,
    "chunk_size": 4,
    "local_tokens": 8,
    "observation_tokens": 7,
    "draft_prefill_chunk": 50,
}
POLICIES = {
    "chunk_retrieval": {},
    "observation_window": {"eviction_policy": "observation_window"},
    "heavy_hitter": {"eviction_policy": "heavy_hitter"},
    "sink_window": {"eviction_policy": "sink_window"},
    "own": {"eviction_policy": EVERY_SECOND},
}
READING = {
    "full": {"draft_prefill": "full"},
    "streaming": {"draft_prefill": "streaming"},
    "relative": {"draft_prefill": "streaming", "position_mode": "cache_relative"},
}
SCOPE = "all"


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter")
    return models.write_model(folder, models.llama(num_hidden_layers=2), seed=3)


def build(drafter, **settings) -> DraftProposer:
    return build_proposer(drafter, **{"num_slots": 3, **SIZES, **settings})


class Contexts:
    """Contexts in slots, of which each goes on, and ends as a snapshot."""

    def __init__(self, proposer: DraftProposer) -> None:
        self.proposer = proposer
        self.by_slot: dict[int, np.ndarray] = {}

    def begin(
        self, slot: int, context: np.ndarray, num_computed: int = 0
    ) -> Match | None:
        """Reads a context, less what is fed first; what spared it that, if anything."""
        proposer, store = self.proposer, self.proposer.snapshots
        tokens = context[:-FIRST_WIDTH]
        match = store.match(SCOPE, tokens)
        known = match.spared if match else 0
        mark = proposer.mark(SCOPE, tokens, num_computed, known)
        budget = None
        if not match or not proposer.go_on_reading(
            slot, len(tokens), budget, match, mark
        ):
            match = None
            proposer.start_reading(slot, len(tokens), budget, mark)
        while proposer.reader.is_reading(slot):
            failed = proposer.read([slot], self._tokens_of(tokens), 1000)
            assert not failed, failed
        self.by_slot[slot] = context
        return match

    def _tokens_of(self, tokens: np.ndarray):
        def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
            ((_, piece),) = pieces
            return torch.from_numpy(tokens[piece.start : piece.stop]).long()

        return tokens_of

    def draft(self, slot: int, rng: Random) -> None:
        """Drafts, of which some are accepted, and a token follows."""
        context = self.by_slot[slot]
        last = torch.from_numpy(context[None, -FIRST_WIDTH:]).long()
        ends = torch.tensor([len(context)])
        drafts = self.proposer.draft(torch.tensor([slot]), last, ends).tokens[0]
        accepted = drafts[: rng.randrange(len(drafts) + 1)].numpy()
        bonus = rng.randrange(models.VOCAB_SIZE)
        self.by_slot[slot] = np.array([*context, *accepted, bonus], dtype=np.int32)

    def end(self, slot: int, later: int = 0) -> np.ndarray:
        """Keeps what the slot has of its context, and returns that."""
        context = self.by_slot.pop(slot)
        end = len(context) - FIRST_WIDTH
        known, rest = context[: len(context) - later], context[len(context) - later :]
        self.proposer.snapshots.keep(
            slot,
            SCOPE,
            known,
            torch.tensor(end) if later else end,
            later_tokens=torch.from_numpy(rest) if later else None,
        )
        return context

    def keys(self, slot: int) -> tuple[Tensor, Tensor]:
        """Of the first layer, which tokens before have no part in: [T, G, D] each.

        Returns:
            Those that a slot holds, and those of all its context.
        """
        cache, context = self.proposer.cache, self.by_slot[slot]
        count = len(context) - FIRST_WIDTH - int(cache.num_evicted[slot])
        return held_by(self.proposer, slot, count)[0][0], keys_of(
            self.proposer, context
        )


def keys_of(proposer: DraftProposer, context: np.ndarray) -> Tensor:
    """Of the first layer, as they are stored: [T, G, D]."""
    drafter, layer = proposer.drafter, proposer.drafter.layers[0]
    tokens = torch.from_numpy(context).long()
    x = torch.nn.functional.embedding(tokens, drafter.embedding)
    x = torch.rms_norm(x, x.shape[-1:], layer.input_norm, layer.eps)
    heads, kv_heads = drafter.num_heads, drafter.num_kv_heads
    qkv = (x @ layer.qkv_weight.T).unflatten(-1, (heads + 2 * kv_heads, -1))
    keys = qkv[:, heads : heads + kv_heads]
    if proposer.config.position_mode == "cache_relative":
        return keys
    cos, sin = (each[:, None] for each in drafter.rotary(torch.arange(len(context))))
    return keys * cos + keys.roll(keys.shape[-1] // 2, -1) * sin


def random_context(length: int, seed: int) -> np.ndarray:
    """Of different tokens next to each other, so that their keys differ."""
    return models.random_tokens(length, seed).numpy().astype(np.int32)


def longer(context: np.ndarray, by: int, seed: int) -> np.ndarray:
    return np.append(context, random_context(by, seed))


@pytest.mark.parametrize("mode", ["absolute", "cache_relative"])
def test_where_everything_is_kept_going_on_is_reading_anew(drafter, mode):
    settings = {"eviction_policy": "keep_all", "position_mode": mode}
    settings |= {"draft_prefill": "full", "num_slots": 2}
    contexts, rng = Contexts(build(drafter, **settings)), Random(0)
    contexts.begin(0, random_context(60, seed=1))
    for _ in range(5):
        contexts.draft(0, rng)
    for turn in range(4):
        before = contexts.end(0, later=turn)
        context = longer(before, 20, seed=2 + turn)
        match = contexts.begin(0, context)
        assert match.spared == len(before) - FIRST_WIDTH
        anew = Contexts(build(drafter, **settings))
        assert anew.begin(0, context) is None
        for ours, theirs in zip(
            held_by(contexts.proposer, 0, len(context) - FIRST_WIDTH),
            held_by(anew.proposer, 0, len(context) - FIRST_WIDTH),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        contexts.draft(0, rng)
        contexts.proposer.cache.check_invariants()


@pytest.mark.parametrize("reading", READING)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_slot_holds_what_it_says_however_it_went_on(drafter, policy, reading):
    """Turns, edits in the middle, answers again, and too few pages to keep them all."""
    settings = POLICIES[policy] | READING[reading]
    kinds = set[str]()
    for num_more in (0, 30):
        proposer = build(drafter, **settings, snapshot_memory_gib=gib(num_more))
        kinds |= play(Contexts(proposer), num_events=120)
    wanted = {"whole", "part", "moved", "copied", "cut", "later"}
    if policy == "heavy_hitter":  # of which pages are missing anywhere
        wanted.remove("cut")
    assert kinds >= wanted


def gib(num_pages: int) -> float | None:
    config = models.llama()
    of_a_token = 2 * 2 * config.num_key_value_heads * config.head_dim * 8
    return (num_pages + 0.5) * SIZES["page_size"] * of_a_token / 2**30 or None


def play(contexts: Contexts, num_events: int) -> set[str]:
    """Which kinds of going on there were."""
    proposer = contexts.proposer
    store, cache = proposer.snapshots, proposer.cache
    rng, past, hits = Random(1), [random_context(70, seed=0)], set[str]()
    for event in range(num_events):
        slot = rng.randrange(3)
        if slot not in contexts.by_slot:
            base = rng.choice(past[-3:])
            base = base[: rng.choice([len(base), rng.randrange(20, 71), 150])]
            num_new = rng.choice([0, 3, 10, 45])
            context = longer(base, num_new, seed=event)
            num_copies = len(store)
            if match := contexts.begin(slot, context, num_computed=len(base) // 2):
                is_whole = match.spared == len(context) - FIRST_WIDTH
                assert match.whole_from <= match.spared  # or it holds others' tokens
                hits.add("whole" if is_whole else "part")
                hits.add("moved" if len(store) < num_copies else "copied")
                hits.add("cut" if match.spared < match.snapshot.facts().end else "")
                hits.add("later" if match.whole_from > 70 else "")
        elif len(contexts.by_slot[slot]) > LONGEST - 10 or rng.random() < 0.2:
            past.append(contexts.end(slot, later=rng.choice([0, 3])))
            continue
        else:
            while rng.random() < 0.8 and len(contexts.by_slot[slot]) < LONGEST - 10:
                contexts.draft(slot, rng)
        check(contexts, slot)
        cache.check_invariants()
        held = sum(len(pages) for pages in cache._held.values())
        assert held + proposer.num_free_pages == cache.pool.num_pages
    return hits


def check(contexts: Contexts, slot: int) -> None:
    """A slot's keys are of rising positions, and the last of them are all there."""
    cache = contexts.proposer.cache
    end = len(contexts.by_slot[slot]) - FIRST_WIDTH
    evicted = int(cache.num_evicted[slot])
    assert end - evicted <= cache.capacity
    whole_from = cache.pages_of(slot).whole_from(evicted, end)
    keys, whole = contexts.keys(slot)
    assert len(keys) == end - evicted
    torch.testing.assert_close(
        keys[len(keys) - (end - whole_from) :], whole[whole_from:end], rtol=0, atol=1e-9
    )
    for ours, theirs in zip(keys.unbind(1), whole[:end].unbind(1), strict=True):
        distances = (ours[:, None] - theirs).abs().amax(-1)
        assert distances.min(1).values.max() < 1e-9
        if contexts.proposer.config.position_mode == "absolute":  # all are different
            assert (distances.argmin(1).diff() > 0).all()
