"""Mask tokens over a paged cache: the lists of pages, the drafts, and their graphs."""

from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import fused, reference
from tests.support import models
from tests.support.fake_graph import FakeGraph, forbid_host_reads
from tests.support.flex_twin import NUM_LAYERS, random_drafter, twin_logits
from vllm_budgetdraft.config import EvictionSettings, SettledConfig
from vllm_budgetdraft.drafter.packing import can_pack
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.flexdraft.packing import pack_matrices
from vllm_budgetdraft.flexdraft.page_lists import PageLists
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.proposer.step_costs import StepCosts
from vllm_budgetdraft.training.flexdraft import target_states

NUM_SLOTS, NUM_DRAFTS, PAGE_SIZE, MAX_MODEL_LEN = 3, 4, 4, 160
NUM_PAGES = NUM_SLOTS * MAX_MODEL_LEN // PAGE_SIZE + 1
SETTINGS: dict[str, Any] = {
    "num_speculative_tokens": NUM_DRAFTS,
    "kv_budget": 24,
    "sink_tokens": 3,
    "local_tokens": 8,
    "recent_window": 36,
}


class Engine:
    """A target of ``transformers``, and a cache of pages that lie anywhere.

    Attributes:
        contexts: token ids of each slot's context; the last is the bonus token.
        prompts: tokens of each slot's prompt.
    """

    def __init__(self, operations: ModuleType = reference, **settings: Any) -> None:
        self.target = models.random_model(models.llama())
        self.drafter = random_drafter(
            self.target, sees_bonus=True, drafts_blind=True, chains=True
        )
        self.core = MaskProposer(
            self.drafter,
            self.target,
            SettledConfig(model="", **SETTINGS | settings),
            operations,
            num_slots=NUM_SLOTS,
            max_model_len=MAX_MODEL_LEN,
            seed=0,
        )
        _, keys, _ = target_states(self.target, torch.tensor([[1]]), NUM_LAYERS)
        shape = (NUM_PAGES, PAGE_SIZE, *keys[0].shape[1::2])
        self.pages = [(torch.zeros(shape), torch.zeros(shape)) for _ in keys]
        self.core.bind(self.pages)
        order = torch.randperm(NUM_PAGES - 1) + 1
        self.blocks = order.view(NUM_SLOTS, -1)
        self.contexts: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}

    def start(self, slot: int, num_prompt: int, budget: int | None = None) -> None:
        tokens = models.random_tokens(num_prompt, seed=num_prompt).tolist()
        self.contexts[slot], self.prompts[slot] = tokens, num_prompt
        self.write(slot, tokens)
        self.core.choose(slot, self.blocks[slot], num_prompt, budget)
        tokens.append(7)

    def grow(self, slot: int, count: int) -> None:
        """The target writes on, by any tokens."""
        context = self.contexts[slot]
        context += models.random_tokens(count, seed=len(context)).tolist()
        self.write(slot, context[:-1])

    def write(self, slot: int, tokens: list[int]) -> None:
        _, keys, values = target_states(self.target, torch.tensor([tokens]), NUM_LAYERS)
        places = torch.arange(len(tokens))
        cells = self.blocks[slot][places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE
        for layer, pages in enumerate(self.pages):
            for half, states in zip(pages, (keys, values), strict=True):
                half.flatten(0, 1)[cells] = states[layer][0].transpose(0, 1)

    def draft(self, slots: list[int], num_drafts: int = 4, **draws: Any) -> Any:
        rows = torch.tensor(slots)
        self.core.place(rows, self.blocks[rows])
        last = torch.tensor([[self.contexts[slot][-1]] for slot in slots])
        ends = torch.tensor([len(self.contexts[slot]) for slot in slots])
        drafts = self.core.draft(rows, last, ends, num_drafts, **draws)
        return [None if x is None else x.clone() for x in drafts]

    def seen(self, slot: int, budget: int = 24, window: int = 36) -> Tensor | None:
        """[layers, G, n] of the context before the bonus token."""
        count, context = self.prompts[slot], self.contexts[slot][:-1]
        prompt = torch.tensor([context[:count]])
        _, keys, _ = target_states(self.target, prompt, NUM_LAYERS)
        visible = [torch.ones(k.shape[1:3], dtype=torch.bool) for k in keys]
        if count > budget:
            chosen = self.core.loop.lists.selector
            visible = [chosen.visible(k, budget)[0] for k in keys]
        last = -(-len(context) // PAGE_SIZE)
        later = torch.arange(count, len(context)) // PAGE_SIZE
        first = max(last - window // PAGE_SIZE, -(-count // PAGE_SIZE))
        is_recent = (later >= first) | (later < -(-count // PAGE_SIZE))
        both = [torch.cat([v, is_recent.expand(len(v), -1)], -1) for v in visible]
        return torch.stack(both)

    def expected(self, slot: int, seen: Tensor | None, is_told: bool = True) -> Tensor:
        context = self.contexts[slot]
        return twin_logits(
            self.target,
            self.drafter,
            context[:-1],
            context[-1],
            NUM_DRAFTS,
            seen,
            is_told=is_told,
        ).argmax(-1)


@pytest.mark.parametrize("operations", [reference, fused])
def test_drafts_see_what_was_chosen_and_what_is_recent(operations):
    engine = Engine(operations)
    engine.start(0, 17)
    engine.start(2, 41)
    for grown in (0, 1, 5, 50):
        for slot in (0, 2):
            engine.grow(slot, grown)
        tokens, *_ = engine.draft([2, 0])
        for row, slot in enumerate((2, 0)):
            seen = engine.seen(slot)
            assert tokens[row].tolist() == engine.expected(slot, seen).tolist()
    assert not engine.seen(0).all(), "the recent window must leave something out"


def test_keep_all_sees_all():
    engine = Engine(eviction_policy="keep_all")
    engine.start(1, 40)
    engine.grow(1, 30)
    tokens, *_ = engine.draft([1])
    assert tokens[0].tolist() == engine.expected(1, None).tolist()


def test_a_request_may_have_a_smaller_budget():
    engine = Engine()
    engine.start(1, 40, budget=17)
    tokens, *_ = engine.draft([1])
    assert tokens[0].tolist() == engine.expected(1, engine.seen(1, budget=17)).tolist()


def test_lists_are_no_longer_for_a_longer_context():
    engine = Engine()
    engine.core.loop.lists.are_cut = False  # as for graphs
    lengths = []
    for num_prompt in (30, 60, 150):
        engine.start(0, num_prompt)
        engine.draft([0])
        slots, ends = torch.tensor([0]), torch.tensor([num_prompt])
        tables, length = engine.core.loop.lists.tables(slots, ends)
        assert {x.shape[-1] for x in tables} == {(24 + 36) // PAGE_SIZE}
        lengths.append(int(length))
    assert max(lengths) <= 24


def test_lists_are_those_of_a_plain_loop():
    """Random prompts, budgets and contexts, against page after page."""
    rng = Random(1)
    for _ in range(60):
        window, budget = rng.choice([4, 9, 30]), rng.choice([12, 25, 200])
        settings = EvictionSettings(sink_tokens=3, local_tokens=8)
        lists = PageLists(
            PageSelector(settings, PAGE_SIZE),
            num_layers=2,
            num_kv_heads=2,
            num_slots=1,
            max_tokens=128,
            kv_budget=budget,
            recent_window=window,
            device=torch.device("cpu"),
        )
        num_prompt, blocks = rng.randint(1, 100), torch.randperm(40)[:32]
        keys = [torch.randn(40, PAGE_SIZE, 2, 6) for _ in range(2)]
        asked = rng.choice([budget, 12])
        lists.choose(0, blocks, num_prompt, keys, asked)
        lists.place(torch.tensor([0]), blocks[None])
        end = rng.randint(num_prompt, 128)
        tables, lengths = lists.tables(torch.tensor([0, 0]), torch.tensor([end, end]))
        num_pages, in_prompt = -(-end // PAGE_SIZE), -(-num_prompt // PAGE_SIZE)
        recent = [
            page
            for page in range(num_pages)
            if page >= max(in_prompt, num_pages - -(-window // PAGE_SIZE))
        ]
        for layer in range(2):
            flat = keys[layer][blocks].flatten(0, 1)[:num_prompt].transpose(0, 1)
            for head in range(2):
                chosen = list(range(in_prompt))
                if num_prompt > asked:
                    chosen = lists.selector.select(flat, asked)[head].tolist()
                expected = blocks[chosen + recent].tolist()
                for row in range(2):
                    found = tables[layer][row, head, : len(expected)]
                    assert found.tolist() == expected
                    missing = num_pages * PAGE_SIZE - end
                    assert lengths[row] == len(expected) * PAGE_SIZE - missing


DRAWS: list[dict[str, Any]] = [
    {},
    {"temperatures": torch.tensor([0.7, 0.0])},
    {"temperatures": torch.tensor([0.7, 0.0]), "top_k": torch.tensor([3, 0])},
]


@pytest.mark.parametrize("operations", [reference, fused])
def test_graphs_draft_what_the_loop_drafts(operations):
    """Of each kind, in batches that a graph pads, and shorter than it drafts."""
    eager, graphs = Engine(operations), Engine(operations)
    graphs.blocks = eager.blocks
    for engine in (eager, graphs):
        for slot, num_prompt in ((0, 17), (2, 41)):
            engine.start(slot, num_prompt)
    graphs.core.warm_up_head()
    graphs.core.warm_up()
    assert graphs.core.capture_graphs(FakeGraph) == 3 * 3 * 3  # sizes, lengths, kinds
    assert graphs.core.num_graphs == 27
    for grown in (0, 3):
        for draws in DRAWS:
            found = []
            for engine in (eager, graphs):
                if not draws:
                    engine.grow(2, grown)
                engine.core._calls._generator.manual_seed(grown)
                found += [engine.draft([2, 0], 4, **draws)]
                one = {name: x[:1] for name, x in draws.items()}
                found[-1] += engine.draft([0], 3, **one)
            torch.testing.assert_close(*found)


def test_nothing_waits_for_the_device():
    engine = Engine()
    engine.core.loop.lists.are_cut = False  # as on a GPU
    engine.start(0, 41)
    slots, ends, last = torch.tensor([0]), torch.tensor([42]), torch.tensor([[7]])
    with forbid_host_reads():
        engine.core.place(slots, engine.blocks[:1])
        engine.core.draft(slots, last, ends, temperatures=None)


def test_a_gpu_captures_graphs_once_the_cache_is_there(monkeypatch):
    pytest.importorskip("vllm")
    from tests.support.fake_gpu import cpus_are_gpus
    from vllm_budgetdraft.vllm_integration import core_loader

    bound = []
    monkeypatch.setattr(core_loader, "bind_to_target", lambda *args: bound.append(args))
    for enforce_eager, num_graphs in ((True, 0), (False, 27)):
        engine = Engine()
        with cpus_are_gpus():
            config = settings_of_engine(enforce_eager)
            core_loader.finish_core(engine.core, config, 1)
        assert engine.core.num_graphs == num_graphs
        assert bound.pop() == (engine.core, 1)


def settings_of_engine(enforce_eager: bool, **speculation: Any) -> Any:
    """What is asked of vLLM's config."""
    settings = SettledConfig(model="", **SETTINGS | speculation)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            enforce_eager=enforce_eager,
            max_model_len=MAX_MODEL_LEN,
            dtype=torch.float32,
            seed=0,
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=NUM_SLOTS, max_num_batched_tokens=512
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        speculative_config=SimpleNamespace(settings=settings),
    )


def test_a_gpu_holds_memory_for_graphs_until_they_are_captured(monkeypatch):
    pytest.importorskip("vllm")
    from tests.support.fake_gpu import cpus_are_gpus
    from vllm_budgetdraft.vllm_integration import core_loader

    engine = Engine()
    alone = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(core_loader, "get_tp_group", lambda: alone)
    monkeypatch.setattr(
        core_loader, "load_flexdraft", lambda *args, **kwargs: engine.drafter
    )
    with cpus_are_gpus():
        for enforce_eager in (True, False):
            config = settings_of_engine(enforce_eager)
            core = core_loader.load_mask_core(config, engine.target)
            assert (core._reserved is None) == enforce_eager
        assert core._reserved.numel() == 2 * NUM_SLOTS * NUM_DRAFTS * models.VOCAB_SIZE
        core.bind(engine.pages)
        core.capture_graphs(FakeGraph)
        assert core._reserved is None


def test_a_target_of_graphs_takes_no_masks_along(monkeypatch):
    pytest.importorskip("vllm")
    from tests.support.fake_gpu import cpus_are_gpus
    from vllm_budgetdraft.vllm_integration import flex_rounds, speculative_config

    monkeypatch.setattr(flex_rounds, "put_beside", lambda *args: None)

    def rounds(mode: str, enforce_eager: bool, can_choose: bool = True) -> Any:
        config = settings_of_engine(enforce_eager)
        core = Engine(flex_decoding=mode).core
        return flex_rounds.rounds_for(
            core, config, None, lambda: None, can_choose=can_choose
        )

    with cpus_are_gpus():
        assert rounds("auto", enforce_eager=False) is None
        assert rounds("parallel", enforce_eager=True).mode == "parallel"
        target = SimpleNamespace(
            enforce_eager=False,
            hf_text_config=models.llama(),
            get_sliding_window=lambda: None,
        )
        config = SettledConfig(model="", **SETTINGS, flex_decoding="parallel")
        written = {"draft_tokens": 4, "sees_bonus": False}
        monkeypatch.setattr(
            speculative_config, "read_flexdraft_config", lambda folder: written
        )
        with pytest.raises(UnsupportedVllmError, match="use enforce_eager=True"):
            speculative_config._check_flexdraft(config, target, SimpleNamespace())
    assert rounds("auto", enforce_eager=False).mode == "sequential"
    assert rounds("auto", enforce_eager=False, can_choose=False) is None
    assert rounds("sequential", enforce_eager=True) is None


def test_a_step_is_timed_where_the_batch_stays_and_all_draft(monkeypatch):
    """vLLM's list of requests is one list, whatever is in it."""
    pytest.importorskip("vllm")
    from vllm_budgetdraft.vllm_integration import flex_rounds

    monkeypatch.setattr(flex_rounds, "put_beside", lambda *args: None)
    monkeypatch.setattr(
        flex_rounds,
        "time_steps",
        lambda runner, core: StepCosts({1: 1.0}, {1: {1: 0.1}, 4: {1: 0.1}}, 4),
    )
    core = Engine(flex_decoding="auto").core
    config = settings_of_engine(True)
    rounds = flex_rounds.rounds_for(core, config, None, lambda: None, can_choose=True)
    rounds.time_steps(None)
    timed, ids = [], ["a"]
    monkeypatch.setattr(
        rounds._switch, "took", lambda mode, size, *args: timed.append(size)
    )
    for step in range(6):
        rounds.begin_step()
        if step == 2:
            ids.append("b")  # prefilled in this step
        if step == 4:
            continue  # nobody drafts
        rounds.take(torch.tensor([0]), 4)
        rounds.next(ids, {}, 4, are_undisturbed=True)
    assert timed == [1, 2]


def test_no_masks_go_along_with_what_nobody_drafts_after(monkeypatch):
    pytest.importorskip("vllm")
    from vllm_budgetdraft.vllm_integration import flex_rounds

    monkeypatch.setattr(flex_rounds, "put_beside", lambda *args: None)
    core, passes = Engine(flex_decoding="parallel").core, []
    config = settings_of_engine(True)
    rounds = flex_rounds.rounds_for(
        core, config, None, lambda: passes.append(1), can_choose=False
    )
    rounds._begin(5)
    assert not passes
    rounds.begin_step()
    rounds.take(torch.tensor([0]), 4)
    rounds._begin(5)
    rounds._begin(512 // 6 + 1)  # more tokens than vLLM has measured
    assert len(passes) == 1
    rounds.begin_step()  # and nobody drafts
    rounds._begin(5)
    assert len(passes) == 1


def test_packed_matrices_are_those_rounded_to_float16():
    if not can_pack():
        pytest.skip("PyTorch has no packed matrices here")
    plain, packed = Engine(), Engine()
    parts, drafter = packed.core.loop.parts, packed.drafter
    assert pack_matrices(drafter, parts) == 2 * parts.head.numel()
    with torch.no_grad():
        for parameter in plain.drafter.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.half().float())
    hidden = torch.randn(3, 2, plain.target.config.hidden_size)
    expected = hidden @ parts.head.half().float().T
    torch.testing.assert_close(parts.logits(hidden), expected)
    features = [each.drafter.features(hidden, hidden) for each in (plain, packed)]
    torch.testing.assert_close(*features)
    corrections = [each.drafter.correction(features[0]) for each in (plain, packed)]
    torch.testing.assert_close(*corrections)
    first = zip(plain.drafter.layers, packed.drafter.layers, strict=True)
    for ours, theirs in first:
        projected = ours.project(hidden)
        torch.testing.assert_close(theirs.project(hidden), projected)
        queries = projected[..., : ours.heads[0], :]
        torch.testing.assert_close(theirs.output(queries), ours.output(queries))


def test_what_float16_cannot_hold_is_not_packed():
    engine = Engine()
    with torch.no_grad():
        engine.drafter.calibration_out[0, 0] = 1e6
    assert pack_matrices(engine.drafter, engine.core.loop.parts) == 0
    assert engine.core.loop.parts.packed_head is None
