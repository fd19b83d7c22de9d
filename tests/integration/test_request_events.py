"""Random sequences of what a server does to requests, with invariants after each."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import PreTrainedModel

from tests.support.adapter import Engine, Request
from tests.support.drafting import is_greedy
from tests.support.policies import FAILS_ON_LONG_PROMPTS

pytestmark = pytest.mark.vllm

NUM_SLOTS, NUM_DRAFTS, MAX_MODEL_LEN = 3, 3, 900
NAMES = [f"request {i}" for i in range(6)]


class RequestEvents(RuleBasedStateMachine):
    """Requests start, wait, resume, end and reuse ids, wherever in their prompts."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        super().__init__()
        self.folder, self.model = folder, model

    @initialize(
        policy=st.sampled_from(
            ["keep_all", "chunk_retrieval", "observation_window", "sink_window"]
            + [FAILS_ON_LONG_PROMPTS]
        ),
        draft_prefill=st.sampled_from(["full", "streaming"]),
    )
    def serve(self, policy: str, draft_prefill: str) -> None:
        self.fails = policy == FAILS_ON_LONG_PROMPTS
        self.keeps_all = policy == "keep_all"
        self.engine = Engine(
            self.folder,
            num_slots=NUM_SLOTS,
            max_model_len=MAX_MODEL_LEN,
            num_speculative_tokens=NUM_DRAFTS,
            eviction_policy=policy,
            draft_prefill=draft_prefill,
            draft_prefill_chunk=300,
            kv_budget=24,
            recent_window=20,
            page_size=8,
        )

    @property
    def batch(self) -> list[str]:
        return [n for n in self.engine.requests if n not in self.engine.waiting]

    @rule(
        name=st.sampled_from(NAMES),
        num_tokens=st.sampled_from([2, 3, 23, 24, 25, 60, 290, 310, 750]),
        in_steps=st.booleans(),
    )
    def start_or_replace(self, name: str, num_tokens: int, in_steps: bool) -> None:
        """An id that is in use ends and begins anew within a step."""
        engine = self.engine
        if name in self.batch or len(self.batch) < NUM_SLOTS:
            engine.waiting.discard(name)
            engine.start(name, num_tokens)
            engine.prefilling.discard(name)
            if in_steps:
                engine.prefilling.add(name)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.engine.requests)))
        self.engine.finish(name)
        self.engine.waiting.discard(name)
        self.engine.prefilling.discard(name)

    @precondition(lambda self: self.batch)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.engine.waiting.add(data.draw(st.sampled_from(self.batch)))

    @precondition(lambda self: self.engine.waiting and len(self.batch) < NUM_SLOTS)
    @rule(data=st.data(), in_steps=st.booleans())
    def resume(self, data: st.DataObject, in_steps: bool) -> None:
        """Its context is prefilled again, in a step or in several."""
        name = data.draw(st.sampled_from(sorted(self.engine.waiting)))
        self.engine.waiting.discard(name)
        if in_steps:
            self.engine.prefilling.add(name)

    @precondition(lambda self: self.engine.prefilling & set(self.batch))
    @rule(data=st.data())
    def sample_the_first_token(self, data: st.DataObject) -> None:
        names = sorted(self.engine.prefilling & set(self.batch))
        name = data.draw(st.sampled_from(names))
        self.engine.prefilling.discard(name)
        self.engine.tokens[name].append(11)

    @precondition(lambda self: self.batch)
    @rule(data=st.data(), count=st.integers(1, 20))
    def steps(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            self.step(data)

    def step(self, data: st.DataObject) -> None:
        engine = self.engine
        for name, drafts in engine.step().items():
            assert len(drafts) in (0, NUM_DRAFTS) or self.near_the_end(name)
            if name in engine.prefilling:
                assert drafts == []
                continue
            tokens = engine.tokens[name]
            own = tokens.pop()
            if self.keeps_all and drafts:
                assert is_greedy(self.model, tokens, drafts)
            accepted = data.draw(st.integers(0, len(drafts)))
            tokens += [*drafts[:accepted], own]
            if len(tokens) >= MAX_MODEL_LEN - 1:
                engine.finish(name)
        self.check()

    def near_the_end(self, name: str) -> bool:
        return len(self.engine.tokens[name]) + NUM_DRAFTS >= MAX_MODEL_LEN

    def check(self) -> None:
        cache, slots = self.engine.core.cache, self.engine.proposer._slots
        cache.check_invariants()
        assert cache.pool.num_pages - cache.pool.num_free == cache.pages_per_slot * len(
            slots._held
        )
        assert len({held.slot for held in slots._held.values()}) == len(slots._held)
        assert self.fails or not self.engine.proposer._faults.num_faults

    def teardown(self) -> None:
        """With every request gone, every page is free."""
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for name in list(engine.requests):
            engine.finish(name)
        engine.waiting, engine.prefilling = set(), set()
        engine.requests["last"], engine.tokens["last"] = Request(), [1]
        engine.prefilling = {"last"}
        engine.step()
        engine.finish("last")
        engine.step()
        cache = engine.core.cache
        cache.check_invariants()
        assert cache.pool.num_free == cache.pool.num_pages


def run(folder: Path, model: PreTrainedModel, examples: int) -> None:
    run_state_machine_as_test(
        lambda: RequestEvents(folder, model),
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_sequence_of_events_leaks_a_page_or_fails(
    drafter_folder, hugging_face_drafter
):
    run(drafter_folder, hugging_face_drafter, examples=100)


@pytest.mark.slow
def test_no_sequence_of_events_leaks_a_page_or_fails_thoroughly(
    drafter_folder, hugging_face_drafter
):
    run(drafter_folder, hugging_face_drafter, examples=2000)
