"""Drafters that read what their target thought, against one that computes all anew.

The target is made up: what it thinks of a token depends on the token and its place.
"""

from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.adapter import Request as State
from tests.support.heads import write_head
from tests.unit.test_feature_drafter import causal
from vllm_budgetdraft.config import BudgetDraftConfig, speculative
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.proposer.building import build_proposer
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer

pytestmark = pytest.mark.vllm

NUM_SLOTS, NUM_DRAFTS, MAX_MODEL_LEN = 3, 3, 120
HIDDEN = models.llama().hidden_size
TABLE = torch.randn(
    models.VOCAB_SIZE, 3 * HIDDEN, generator=torch.Generator().manual_seed(3)
)
EMBEDDING = torch.randn(
    models.VOCAB_SIZE, HIDDEN, generator=torch.Generator().manual_seed(4)
)


def states_of(tokens: list[int], first: int) -> Tensor:
    """What the target thinks of tokens that begin at a place: [T, 3 * HIDDEN]."""
    places = torch.arange(first, first + len(tokens))[:, None]
    return TABLE[tokens] + torch.sin(places / 7)


def build(folder: Path, **settings: object) -> DraftProposer:
    config = BudgetDraftConfig(
        model=str(folder),
        **{
            "num_speculative_tokens": NUM_DRAFTS,
            "kv_budget": MAX_MODEL_LEN,
            "draft_dtype": "float32",
            **settings,
        },
    )
    return build_proposer(
        config,
        num_slots=NUM_SLOTS,
        max_model_len=MAX_MODEL_LEN,
        dtype=torch.float32,
        device="cpu",
        vocab_size=models.VOCAB_SIZE,
        embedding=EMBEDDING,
    )


def expected_drafts(drafter: FeatureDrafter, context: list[int], origin: int) -> list:
    """All positions from the first known one on, and then drafts, one by one."""
    tokens = context[origin + 1 :]
    features = drafter.combined(states_of(context[origin:-1], origin))
    drafts: list[int] = []
    for _ in range(NUM_DRAFTS):
        attend = causal(drafter, len(tokens))
        normed, following = drafter.step(torch.tensor(tokens), features, attend)
        place = int(drafter.logits(normed[-1]).argmax())
        drafts.append(int(drafter.draft_ids[place]))
        tokens = [*tokens, drafts[-1]]
        features = torch.cat([features, following[-1:]])
    return drafts


class Simulated:
    """An engine that prefills in chunks, verifies by chance, preempts and begins anew.

    Attributes:
        contexts: tokens by request.
        computed: tokens that the target knows, by request.
        origins: what the drafter knows first, by request; None where it holds nothing.
    """

    def __init__(self, core: DraftProposer, seed: int) -> None:
        from vllm_budgetdraft.vllm_integration.v1.feature_drafting import (
            FeatureDrafting,
        )

        self.core, self.random = core, Random(seed)
        self.drafter = FeatureDrafting(core, NUM_SLOTS)
        self.contexts: dict[str, list[int]] = {}
        self.prompts: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.origins: dict[str, int] = {}
        self.states: dict[str, State] = {}
        self.drafts: dict[str, list[int]] = {}
        self.num_drafted = 0

    def start(self) -> None:
        name = f"request {self.random.random()}"
        length = self.random.choice([1, 2, 3, 20, 45])
        self.contexts[name] = [
            self.random.randrange(models.VOCAB_SIZE) for _ in range(length)
        ]
        self.prompts[name], self.states[name] = length, State()
        # A cached prefix, of all but one token at most.
        hit = self.random.choice([0, 0, length // 2, length - 1])
        self.computed[name] = self.origins[name] = hit

    def end(self, name: str) -> None:
        for each in (self.contexts, self.prompts, self.computed, self.origins):
            del each[name]
        del self.states[name]
        self.drafts.pop(name, None)

    def preempt(self, name: str) -> None:
        self.computed[name] = self.origins[name] = 0
        self.prompts[name] = len(self.contexts[name])
        self.drafts.pop(name, None)

    def step(self) -> None:
        """A step of the target for some requests, and drafts, compared."""
        from vllm_budgetdraft.vllm_integration.v1.drafting import Request

        batch = [n for n in self.contexts if self.random.random() < 0.9]
        requests, states, first = [], [], 0
        for row, name in enumerate(batch):
            context, start = self.contexts[name], self.computed[name]
            drafted = self.drafts.pop(name, [])
            if start < self.prompts[name]:
                end = min(self.prompts[name], start + self.random.choice([5, 17, 60]))
                computed = context[start:end]
                sampled = end == self.prompts[name]
                accepted = 0
            else:
                computed = [context[-1], *drafted]
                accepted = self.random.randint(0, len(drafted))
                sampled = True
            if sampled:
                bonus = self.random.randrange(models.VOCAB_SIZE)
                context += [*drafted[:accepted], bonus]
            states.append(states_of(computed, start))
            room = MAX_MODEL_LEN - 1 - len(context)
            requests.append(
                Request(
                    row,
                    name,
                    self.states[name],
                    context=np.array(context, dtype=np.int32),
                    sampled=sampled,
                    max_drafts=min(self.random.choice([0, 1, NUM_DRAFTS]), room),
                    num_computed=start,
                    num_scheduled=len(computed),
                    first_state=first,
                )
            )
            first += len(computed)
            self.computed[name] = start + len(computed) - len(drafted) + accepted
        if not requests:
            return
        self.drafter.forget_ended(self.states)
        found = self.drafter.draft(requests, states=torch.cat(states))
        for request in requests:
            drafts = found.get(request.row, [])
            if not request.sampled or not request.max_drafts:
                assert not drafts
                continue
            origin = self.origins[request.request_id]
            context = self.contexts[request.request_id]
            expected = expected_drafts(self.core.drafter, context, origin)
            assert drafts == expected[: request.max_drafts], (request, origin)
            self.drafts[request.request_id] = drafts
            self.num_drafted += 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variant", ["plain", "norm_output", "graphs", "relative"])
def test_drafts_are_those_of_a_head_that_computes_all_anew(tmp_path, seed, variant):
    changes = {"norm_output": True} if variant == "norm_output" else {}
    folder = write_head(tmp_path, max_position_embeddings=512, **changes)
    settings = {}
    if variant == "relative":
        settings = {"position_mode": "cache_relative"}
    core = build(folder, **settings)
    if variant == "graphs":
        from tests.support.fake_graph import FakeGraph

        core.capture_graphs(FakeGraph)
    engine = Simulated(core, seed)
    for _ in range(60):
        if len(engine.contexts) < NUM_SLOTS and engine.random.random() < 0.4:
            engine.start()
        for name in list(engine.contexts):
            is_long = len(engine.contexts[name]) > MAX_MODEL_LEN - 2 * NUM_DRAFTS - 2
            if is_long or engine.random.random() < 0.03:
                engine.end(name)
            elif engine.random.random() < 0.05:
                engine.preempt(name)
        engine.step()
    assert engine.num_drafted > 20


def test_a_small_budget_keeps_its_memory_and_goes_on(tmp_path):
    settings = {"kv_budget": 24, "recent_window": 35, "sink_tokens": 4}
    settings |= {"chunk_size": 4, "local_tokens": 8, "page_size": 8}
    core = build(write_head(tmp_path, max_position_embeddings=512), **settings)
    engine = Simulated(core, 0)
    engine.start()
    (name,) = engine.contexts
    engine.contexts[name] = models.random_tokens(60).tolist()
    engine.prompts[name] = 60
    engine.computed[name] = engine.origins[name] = 0
    with pytest.raises(AssertionError, match="Request"):  # drafts of less than all
        for _ in range(40):
            engine.step()
    slot = engine.drafter._slots.get(name, engine.states[name]).slot
    core.cache.check_slot(slot)


def step(engine: Simulated, **requests: tuple[int, int, bool]) -> dict[int, list[int]]:
    """A step by hand: of each request, tokens known before, computed, and sampled."""
    from vllm_budgetdraft.vllm_integration.v1.drafting import Request

    made, states, first = [], [], 0
    for row, (name, (start, count, sampled)) in enumerate(requests.items()):
        context = engine.contexts[name]
        states.append(states_of(context[start : start + count], start))
        made.append(
            Request(
                row,
                name,
                engine.states.setdefault(name, State()),
                context=np.array(context, dtype=np.int32),
                sampled=sampled,
                max_drafts=NUM_DRAFTS,
                num_computed=start,
                num_scheduled=count,
                first_state=first,
            )
        )
        first += count
    return engine.drafter.draft(made, states=torch.cat(states))


@pytest.mark.parametrize("reading", ["full", "streaming"])
def test_prompts_of_one_step_are_read_in_it(tmp_path, monkeypatch, reading):
    """However many passes that takes: what is not read then is lost."""
    monkeypatch.setattr(speculative, "MAX_PASS_TOKENS", 32)
    settings = {"draft_prefill": reading, "kv_budget": 64, "draft_prefill_chunk": 16}
    core = build(write_head(tmp_path, max_position_embeddings=512), **settings)
    engine = Simulated(core, 0)
    for name in "abc":
        engine.contexts[name] = models.random_tokens(101, seed=ord(name)).tolist()
    drafts = step(engine, a=(0, 100, True), b=(0, 100, True), c=(0, 60, False))
    assert sorted(drafts) == [0, 1] and all(drafts.values())
    engine.contexts["c"].append(3)
    assert step(engine, c=(60, 41, True))


def test_a_session_that_goes_on_otherwise_begins_anew(tmp_path):
    """As vLLM's streaming inputs do: the last sampled token is thrown away."""
    core = build(write_head(tmp_path, max_position_embeddings=512))
    engine = Simulated(core, 0)
    engine.contexts["a"] = [*range(20), 5]
    assert step(engine, a=(0, 20, True))[0] == expected_drafts(
        core.drafter, engine.contexts["a"], 0
    )
    engine.contexts["a"][20:] = [7, *range(30, 50)]
    assert not step(engine, a=(20, 10, False))
    engine.contexts["a"].append(8)
    found = step(engine, a=(30, 11, True))
    expected = expected_drafts(core.drafter, engine.contexts["a"], 20)
    assert found[0] == expected


def test_a_request_that_asks_for_nothing_does_not_hide_who_drafts(tmp_path):
    core = build(write_head(tmp_path, max_position_embeddings=512))
    engine = Simulated(core, 0)
    for name in "ab":
        engine.contexts[name] = [*range(20), 5]
    engine.states["b"] = State(num_speculative_tokens=0)
    step(engine, a=(0, 20, True), b=(0, 20, True))
    assert not engine.drafter.has_only_drafted, "one of them had to read"
    for name in "ab":
        engine.contexts[name].append(6)
    step(engine, a=(20, 1, True), b=(20, 1, True))
    assert engine.drafter.has_only_drafted


def test_requests_that_ask_for_nothing_get_nothing(tmp_path):
    core = build(write_head(tmp_path, max_position_embeddings=512))
    engine = Simulated(core, 1)
    engine.start()
    (name,) = engine.contexts
    engine.states[name].sampling_params = SimpleNamespace(
        extra_args={"num_speculative_tokens": 0}
    )
    for _ in range(8):
        try:
            engine.step()
        except AssertionError as error:
            assert "Request" in str(error)
    assert core.cache.pool.num_free == core.plan.num_pages
