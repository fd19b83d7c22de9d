"""Contexts that go on from what was kept of others: see ``SnapshotStore``."""

from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.drafting import build_proposer, held_by
from tests.support.fake_gpu import ClockEvent, cpus_are_gpus
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
    "last_query": {"eviction_policy": "last_query"},
    "key_diversity": {"eviction_policy": "key_diversity"},
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


@pytest.mark.parametrize(
    ("mode", "native"), [("absolute", 512), ("cache_relative", 110)]
)
def test_what_is_read_beside_a_snapshot_has_room(tmp_path, mode, native):
    """More than the budget is held then, and a policy may leave much out."""
    config = models.llama(num_hidden_layers=2, max_position_embeddings=native)
    folder = models.write_model(tmp_path, config, seed=3)
    settings = {"eviction_policy": "sink_window", "draft_prefill": "streaming"}
    settings |= {"position_mode": mode, "draft_prefill_chunk": 64, "kv_budget": 48}
    contexts, rng = Contexts(build(folder, **settings, recent_window=40)), Random(0)
    contexts.begin(0, random_context(60, seed=1))
    while len(contexts.by_slot[0]) < 88:
        contexts.draft(0, rng)
    before, prompt = contexts.end(0), contexts.proposer.reader.prompt
    most, extend = [], prompt.extend

    def noted(pieces: list, *args: Tensor) -> object:
        found = extend(pieces, *args)
        most.append(max(segment.num_held for segment, _ in pieces))
        return found

    prompt.extend = noted
    for length in (40, 100, 160):
        context = longer(before, length, seed=length)
        assert contexts.begin(0, context), length
        check(contexts, 0)
        contexts.proposer.release_request(0)
    assert 64 < max(most) <= min(48 + 64, native)


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
            num_new = rng.choice([0, 3, 10, 45, 100])
            context = longer(base, num_new, seed=event)
            num_copies = len(store)
            if match := contexts.begin(slot, context, num_computed=len(base) // 2):
                is_whole = match.spared == len(context) - FIRST_WIDTH
                assert match.whole_from <= match.spared  # or it holds others' tokens
                hits.add("whole" if is_whole else "part")
                hits.add("moved" if len(store) < num_copies else "copied")
                hits.add("cut" if match.spared < match.snapshot.facts.end else "")
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
        assert len(cache._kept) == store.num_pages
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


def test_on_a_gpu_nothing_waits_until_somebody_asks(drafter, monkeypatch):
    waited = []
    with cpus_are_gpus():
        contexts = Contexts(build(drafter, attention_backend="torch"))
        monkeypatch.setattr(ClockEvent, "synchronize", lambda e: waited.append(e))
        context = random_context(60, seed=1)
        contexts.begin(0, context)
        contexts.end(0, later=3)
        assert not waited
        assert contexts.begin(0, context).spared == 58
    assert len(waited) == 1


def test_on_a_gpu_no_list_is_copied_while_it_waits(drafter, monkeypatch):
    """Which a GPU would do before anything else; lists of pages are not copied."""
    with cpus_are_gpus():
        contexts = Contexts(build(drafter, attention_backend="torch"))
        system = random_context(100, seed=1)
        contexts.begin(0, longer(system, 9, seed=2))
        for name in ("tensor", "as_tensor"):
            monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("copied"))
        context = contexts.by_slot.pop(0)
        contexts.proposer.snapshots.keep(0, SCOPE, context, len(context) - 2)
        contexts.begin(0, longer(system, 9, seed=3), num_computed=100)
        assert contexts.begin(1, longer(system, 9, seed=4)).spared == 100


def test_contexts_that_take_turns_in_as_many_slots_all_go_on(drafter):
    """What one begins with is not copied if others would have to go for that."""
    contexts = Contexts(build(drafter))
    known = [random_context(60, seed=each) for each in range(3)]
    for turn in range(4):
        for each in range(3):
            match = contexts.begin(each, longer(known[each], 30, seed=turn))
            assert (match is not None) == (turn > 0), (turn, each)
            check(contexts, each)
            known[each] = contexts.end(each)


def test_a_beginning_that_is_shared_serves_many_where_there_is_no_room(drafter):
    """It is copied though others go for that, and not used up."""
    contexts = Contexts(build(drafter, kv_budget=48))
    proposer, system = contexts.proposer, random_context(130, seed=1)
    for call in range(6):
        context = longer(system, 20, seed=call)
        match = contexts.begin(0, context, num_computed=130 if call else 0)
        assert (match is not None) == (call > 1), call
        contexts.end(0)
        # One whose snapshot is of no use to anybody takes room.
        contexts.begin(1, random_context(90, seed=50 + call))
        contexts.end(1)
    assert proposer.snapshots.num_evicted > 3


def test_a_prompt_that_is_wholly_kept_can_be_cut_in_itself(drafter):
    contexts = Contexts(build(drafter))
    context = random_context(40, seed=1)
    contexts.begin(0, context)
    contexts.end(0)
    match = contexts.begin(1, longer(context[:25], 20, seed=2))
    assert (match.spared, match.num_held) == (25, 25)
    check(contexts, 1)


def test_a_short_context_takes_few_pages(drafter):
    contexts = Contexts(build(drafter))
    proposer = contexts.proposer
    for each in range(10):
        contexts.begin(0, random_context(18, seed=each))
        contexts.end(0)
    assert len(proposer.snapshots) == 10 and proposer.snapshots.num_pages == 20


@pytest.mark.parametrize("failing", ["are_finite", "copy_pages", "fill_pages"])
def test_nothing_leaks_where_it_fails(drafter, failing, monkeypatch):
    contexts = Contexts(build(drafter))
    proposer, cache = contexts.proposer, contexts.proposer.cache
    system = random_context(100, seed=1)
    contexts.begin(0, longer(system, 9, seed=2))
    if failing != "are_finite":
        contexts.end(0)
    with monkeypatch.context() as patch:
        owner = cache if failing != "fill_pages" else cache._operations
        name = failing if failing != "fill_pages" else "page_compaction"

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no memory")

        patch.setattr(owner, name, fail)
        if failing == "are_finite":
            with pytest.raises(RuntimeError):
                contexts.end(0)
        elif failing == "copy_pages":
            with pytest.raises(RuntimeError):
                contexts.begin(1, longer(system, 9, seed=2))
        else:  # which costs the one that reads nothing
            patch.setattr(
                cache, "load_prompts", lambda *_, **__: None
            )  # it compacts pages, too
            contexts.begin(1, longer(system, 9, seed=3), num_computed=100)
    assert len(cache._kept) == proposer.snapshots.num_pages
    proposer.release_all()
    assert cache.pool.num_free == cache.pool.num_pages


def test_what_is_not_finite_serves_nobody(drafter):
    contexts = Contexts(build(drafter))
    context = random_context(60, seed=1)
    contexts.begin(0, context)
    cache = contexts.proposer.cache
    cache.pool.keys[1, cache.page_table.pages[0, 2], 3] = torch.nan
    contexts.end(0)
    assert contexts.begin(0, context) is None
    assert not len(contexts.proposer.snapshots)
    assert cache.pool.keys.isfinite().all()


def test_a_beginning_that_is_shared_is_kept_when_it_is_read_again(drafter):
    """The first of three contexts knows of nobody, the second one tells the third."""
    settings = {"kv_budget": 48, "num_slots": 4, "eviction_policy": "sink_window"}
    settings |= {"snapshot_memory_gib": gib(20)}
    contexts = Contexts(build(drafter, **settings))
    system = random_context(130, seed=1)
    first, second, third = (longer(system, 20, seed=each) for each in (2, 3, 4))
    assert contexts.begin(0, first) is None
    assert contexts.begin(1, second, num_computed=130) is None
    check(contexts, 1)
    match = contexts.begin(2, third, num_computed=130)
    assert (match.spared, match.num_held) == (130, 48)
    check(contexts, 2)
    # What reading the beginning alone would have kept, and nothing else.
    alone = Contexts(build(drafter, **settings))
    alone.begin(0, np.append(system, [1, 1]).astype(np.int32))
    pages = match.snapshot.pages
    wanted, _ = held_by(alone.proposer, 0, 48)
    cells = pages.order.repeat_interleave(8) * 8 + torch.arange(8).repeat(6)
    found = contexts.proposer.cache.pool.keys.flatten(1, 2)[:, cells]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    # Not where that would spare less than it costs.
    many = len(contexts.proposer.snapshots)
    contexts.begin(3, longer(system[:60], 30, seed=5), num_computed=60)
    assert len(contexts.proposer.snapshots) == many


def test_the_memory_that_is_kept_is_bounded(drafter):
    """Ten thousand contexts begin and end, of other lengths and scopes."""
    proposer = build(drafter, snapshot_memory_gib=gib(25))
    store, cache, rng = proposer.snapshots, proposer.cache, Random(2)
    held: set[int] = set()
    for event in range(10_000):
        slot = rng.randrange(3)
        if slot in held:
            tokens = np.full(rng.randrange(4, 60), event % 90, dtype=np.int32)
            if rng.random() < 0.1:
                proposer.release_request(slot)
            else:
                store.keep(slot, rng.randrange(5), tokens, len(tokens))
            held.remove(slot)
        else:
            tokens = np.full(rng.randrange(4, 60), rng.randrange(90), dtype=np.int32)
            match = store.match(rng.randrange(5), tokens)
            if not (match and proposer.go_on_reading(slot, len(tokens), None, match)):
                proposer.start_request(slot)
            proposer.reader.stop(slot)
            held.add(slot)
        assert store.num_pages == len(cache._kept) <= 30 + 25
        if event % 100 == 0:
            cache.check_invariants()
    assert store.num_evicted > 1000
    proposer.release_all()
    assert cache.pool.num_free == cache.pool.num_pages == 30 + 25
