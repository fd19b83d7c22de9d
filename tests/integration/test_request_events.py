"""Random sequences of what a server does to requests, checked at every step."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from tests.support import models
from tests.support.adapter import Request
from tests.support.policies import EVERY_SECOND, EverySecond
from tests.support.watched_engine import WatchedEngine
from vllm_budgetdraft.eviction.base import PromptStates

pytestmark = pytest.mark.vllm

NUM_SLOTS, NUM_DRAFTS, MAX_MODEL_LEN = 3, 3, 160
#: So small that generation evicts a page every few steps.
SETTINGS = {
    "num_slots": NUM_SLOTS,
    "max_model_len": MAX_MODEL_LEN,
    "num_speculative_tokens": NUM_DRAFTS,
    "draft_prefill_chunk": 20,
    "kv_budget": 24,
    "recent_window": 11,
    "sink_tokens": 4,
    "chunk_size": 4,
    "local_tokens": 8,
    "observation_tokens": 5,
    "pooling_size": 3,
}
#: Drafts by batch size, none or fewer for some.
SCHEDULES = [None, [(1, 1, 3), (2, 2, 1), (3, 3, 0)], [(1, 2, 0), (3, 3, 2)]]
#: Two layers, the fewest whose cache depends on attention, and float64.
BYTES_PER_TOKEN = (
    2 * 2 * 8 * models.SIZES["num_key_value_heads"] * models.SIZES["head_dim"]
)


class FailsAtSomeKeys(EverySecond):
    """Raises at about one prompt in five."""

    def select(self, states: PromptStates, budget: int) -> Tensor:
        if states.keys[0, 0, -1, 0] > 1.5:
            raise RuntimeError("this policy fails on purpose")
        return super().select(states, budget)


POLICIES = {
    "keep_all": "keep_all",
    "chunk_retrieval": "chunk_retrieval",
    "observation_window": "observation_window",
    "heavy_hitter": "heavy_hitter",
    "sink_window": "sink_window",
    "of_the_user": EVERY_SECOND,
    "fails": f"{__name__}:{FailsAtSomeKeys.__name__}",
}
NAMES = [f"request {i}" for i in range(6)]
STEPS = st.tuples(
    st.integers(0, NUM_DRAFTS), st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 8, 30])
)
PREFILL_STEPS = st.sampled_from([0, 0, 0, 1, 4])
ASKS = [{}, {}, {"kv_budget": 17}, {"kv_budget": 9, "num_speculative_tokens": 2}]
ASKS += [{"num_speculative_tokens": n} for n in (2, 1, 0)]


class RequestEvents(RuleBasedStateMachine):
    """Requests start, wait, resume, end and reuse ids, wherever in their prompts."""

    def __init__(self, policy: str, folder: Path, folder_of_short_range: Path) -> None:
        super().__init__()
        self.policy = policy
        self.folder, self.folder_of_short_range = folder, folder_of_short_range
        self.num_started = 0
        self.steps_left: dict[str, int] = {}
        self.rolled_back: set[str] = set()  # that have not sampled since

    @initialize(
        draft_prefill=st.sampled_from(["full", "streaming"]),
        position_mode=st.sampled_from(["absolute", "cache_relative"]),
        page_size=st.sampled_from([4, 3]),
        slots_in_pool=st.sampled_from([None, None, 2.5]),
        schedule=st.sampled_from(SCHEDULES),
        threshold=st.sampled_from([0.0, 0.0, 0.1]),
    )
    def serve(
        self,
        draft_prefill: str,
        position_mode: str,
        page_size: int,
        slots_in_pool: float | None,
        schedule: list[tuple[int, int, int]] | None,
        threshold: float,
    ) -> None:
        keeps_all = self.policy == "keep_all"
        folder, pool_memory_gib = self.folder, None
        if (draft_prefill, position_mode) == ("streaming", "cache_relative"):
            folder = folder if keeps_all else self.folder_of_short_range
        if slots_in_pool is not None:
            tokens = slots_in_pool * (MAX_MODEL_LEN + 4 if keeps_all else 40)
            pool_memory_gib = tokens * BYTES_PER_TOKEN / 2**30
        self.engine = WatchedEngine(
            folder,
            eviction_policy=self.policy,
            draft_prefill=draft_prefill,
            position_mode=position_mode,
            page_size=page_size,
            pool_memory_gib=pool_memory_gib,
            num_speculative_tokens_per_batch_size=schedule,
            draft_confidence_threshold=threshold,
            **SETTINGS,
        )
        for name, num_tokens in zip(NAMES, (30, 100, 60), strict=False):
            self.start(name, num_tokens, Request())

    @property
    def has_a_place(self) -> bool:
        return len(self.engine.batch) < NUM_SLOTS

    @property
    def sampling(self) -> list[str]:
        return [n for n in self.engine.requests if n not in self.engine.prefilling]

    @property
    def running(self) -> list[str]:
        return [name for name in self.sampling if name not in self.engine.waiting]

    def start(self, name: str, num_tokens: int, request: Request) -> None:
        """An id that is in use ends and begins anew within a step."""
        self.num_started += 1
        tokens = models.random_tokens(num_tokens, seed=self.num_started)
        self.engine.requests[name], self.engine.tokens[name] = request, tokens.tolist()
        self.engine.prefilling.discard(name)
        self.rolled_back.discard(name)

    def append(self, name: str, count: int) -> None:
        """Tokens that nobody drafted; at the longest context, another request."""
        tokens = self.engine.tokens[name]
        tokens += [(len(tokens) * 7 + i) % models.VOCAB_SIZE for i in range(count)]
        if len(tokens) >= MAX_MODEL_LEN:
            self.start(name, 20 + self.num_started % 60, Request())

    def prefill(self, name: str, steps: int) -> None:
        """So many steps go by in which the request samples nothing."""
        self.steps_left[name] = steps
        if steps:
            self.engine.prefilling.add(name)

    @rule(
        name=st.sampled_from(NAMES),
        num_tokens=st.sampled_from([60, 2, 3, 25, 26, 27, 43, 110, 155, 158]),
        prefill_steps=PREFILL_STEPS,
        asks=st.sampled_from(ASKS),
        is_embeds=st.sampled_from([False] * 9 + [True]),
    )
    def start_or_replace(
        self,
        name: str,
        num_tokens: int,
        prefill_steps: int,
        asks: dict[str, int],
        is_embeds: bool,
    ) -> None:
        if name not in self.engine.batch and not self.has_a_place:
            return
        if self.policy == "keep_all":  # which knows no budget
            asks = {key: asks[key] for key in asks if key != "kv_budget"}
        request = Request(**asks)
        request.prompt_embeds = "of some prompt" if is_embeds else None
        self.start(name, num_tokens, request)
        self.engine.waiting.discard(name)
        self.prefill(name, prefill_steps)

    @precondition(lambda self: len(self.engine.batch) > 1)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.engine.requests)))
        self.engine.finish(name)
        self.engine.waiting.discard(name)
        self.engine.prefilling.discard(name)

    @precondition(lambda self: len(self.engine.batch) > 1)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.engine.waiting.add(data.draw(st.sampled_from(self.engine.batch)))

    @precondition(lambda self: self.engine.waiting and self.has_a_place)
    @rule(data=st.data(), prefill_steps=PREFILL_STEPS)
    def resume(self, data: st.DataObject, prefill_steps: int) -> None:
        """Its context is prefilled again."""
        name = data.draw(st.sampled_from(sorted(self.engine.waiting)))
        self.engine.waiting.discard(name)
        if name not in self.engine.prefilling:
            self.prefill(name, prefill_steps)

    @precondition(lambda self: set(self.sampling) - self.rolled_back)
    @rule(data=st.data(), count=st.sampled_from([1, 2, 3, 4, 5, 30]))
    def go_on_otherwise(self, data: st.DataObject, count: int) -> None:
        """A context grows by tokens that are no accepted drafts."""
        names = sorted(set(self.sampling) - self.rolled_back)
        self.append(data.draw(st.sampled_from(names)), count)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 9), prefill_steps=PREFILL_STEPS)
    def roll_back(self, data: st.DataObject, count: int, prefill_steps: int) -> None:
        """Tokens that were sampled already are computed again."""
        name = data.draw(st.sampled_from(self.running))
        tokens, twin = self.engine.tokens[name], self.engine.twins.get(name)
        if twin is None:
            count = 1  # of a step without drafts
        elif self.engine.core.config.num_speculative_tokens_per_batch_size:
            # It may grow again before it is looked at.
            count = max(1, min(count, len(tokens) - twin.num_known))
        del tokens[-min(count, len(tokens) - 1) :]
        self.rolled_back.add(name)
        self.prefill(name, prefill_steps)
        if not prefill_steps:
            self.append(name, 1)
            self.steps([(0, 0)])

    @rule(steps=st.lists(STEPS, min_size=1, max_size=12))
    def steps(self, steps: list[tuple[int, int]]) -> None:
        """So many drafts are accepted in each, if there are as many.

        As many tokens follow as the second number says, in steps that nobody sees.
        """
        engine = self.engine
        for accepted, unseen in steps:
            for name, drafts in engine.propose().items():
                if name in engine.prefilling:
                    self.steps_left[name] -= 1
                    if self.steps_left[name]:
                        continue
                    engine.prefilling.discard(name)
                else:
                    self.rolled_back.discard(name)
                engine.tokens[name] += drafts[:accepted]
                self.append(name, 1 + unseen)

    def teardown(self) -> None:
        """With every request gone, every page is free."""
        if hasattr(self, "engine"):
            self.engine.requests.clear()
            self.engine.propose()
            pool = self.engine.core.cache.pool
            assert pool.num_free == pool.num_pages


def run(policy: str, tmp_path: Path, examples: int) -> None:
    config = models.llama(num_hidden_layers=2)
    models.write_model(tmp_path / "long", config)
    # Long enough for the cache, too short for the cache and a chunk of the prompt.
    config.max_position_embeddings = 42
    models.write_model(tmp_path / "short", config)
    run_state_machine_as_test(
        # Other sequences for each policy, the same ones in every run.
        seed(policy)(
            lambda: RequestEvents(policy, tmp_path / "long", tmp_path / "short")
        ),
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


@EVERY_POLICY
def test_whatever_happens_drafts_are_those_of_the_right_cache(policy, tmp_path):
    run(policy, tmp_path, examples=12)


@pytest.mark.slow
@EVERY_POLICY
def test_whatever_happens_drafts_are_those_of_the_right_cache_thoroughly(
    policy, tmp_path
):
    run(policy, tmp_path, examples=300)
