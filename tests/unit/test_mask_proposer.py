"""Mask tokens over a paged cache: the lists of pages, the drafts, and their graphs."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from budgetdraft_kernels import fused, reference
from tests.support import models
from tests.support.fake_graph import FakeGraph, forbid_host_reads
from tests.support.launch_count import counted_launches
from tests.support.mask_engine import (
    NUM_DRAFTS,
    NUM_SLOTS,
    PAGE_SIZE,
    Engine,
    settings_of_engine,
)
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.drafter.packing import can_pack
from vllm_budgetdraft.flexdraft.packing import pack_matrices
from vllm_budgetdraft.flexdraft.page_lists import PageLists
from vllm_budgetdraft.flexdraft.pages import PageSelector


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


def test_a_draft_launches_as_many_kernels_for_any_batch():
    engine, counts = Engine(fused), []
    engine.core.loop.lists.are_cut = False  # as on a GPU
    for slot, num_prompt in ((0, 17), (1, 41), (2, 60)):
        engine.start(slot, num_prompt)
    for slots in ([0], [0, 1], [0, 1, 2]):
        with counted_launches() as launches:
            engine.draft(slots)
        counts.append(sum(launches.values()))
    assert counts == counts[:1] * 3


def test_nothing_waits_for_the_device():
    engine = Engine()
    engine.core.loop.lists.are_cut = False  # as on a GPU
    engine.start(0, 41)
    slots, ends, last = torch.tensor([0]), torch.tensor([42]), torch.tensor([[7]])
    with forbid_host_reads():
        engine.core.place(slots, engine.blocks[:1])
        engine.core.draft(slots, last, ends, temperatures=None)


@pytest.mark.vllm
def test_a_gpu_captures_graphs_once_the_cache_is_there(monkeypatch):
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


@pytest.mark.vllm
def test_a_gpu_holds_memory_for_graphs_until_they_are_captured(monkeypatch):
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


@pytest.mark.skipif(not can_pack(), reason="PyTorch has FBGEMM on x86 alone")
def test_packed_matrices_are_those_rounded_to_float16():
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
