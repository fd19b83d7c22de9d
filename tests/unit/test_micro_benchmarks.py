import json
import sys
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch

from benchmarks.micro import (
    attention_report,
    attention_rows,
    contexts,
    gate,
    report_file,
    settings_sweep,
    targets,
    timing,
    workloads,
)
from benchmarks.micro.attention_rows import Cell
from budgetdraft_kernels import launch_settings, reference

CPU = torch.device("cpu")
SHAPE = workloads.ModelShape("tiny", 4, 2, 8, num_layers=3, vocab_size=50)
TINY = ["--device", "cpu", "--shapes", "llama-68m", "--batches", "2", "--budgets", "32"]


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(timing, "CPU_COPY_BYTES", 1 << 16)


def run(path, *arguments):
    status = attention_report.main(["--output", str(path), *TINY, *arguments])
    return status, json.loads(path.read_text())


def test_report_has_every_row_and_its_provenance(tmp_path, capsys):
    status, document = run(tmp_path / "new" / "report.json")

    assert status == 0
    assert document["complete"] and document["left_out"] == []
    assert document["provenance"]["versions"]["torch"]
    assert document["provenance"]["arguments"]["budgets"] == [32]
    assert document["device"]["copy_bandwidth_bytes_per_s"] > 0
    cells = [
        tuple(row[name] for name in ("kind", "shape", "batch", "budget", "context"))
        for row in document["rows"]
    ]
    assert cells == [
        ("context", "llama-68m", 2, 32, 64),
        ("context", "llama-68m", 2, 32, 256),
        ("bandwidth", "llama-68m", 2, 32, None),
    ]
    contexts_row, bandwidth_row = document["rows"][0], document["rows"][-1]
    assert set(contexts_row["times"]) == {"attention", "step"}
    assert set(bandwidth_row["speedup_over"]) == {"sdpa", "gather_and_sdpa"}
    for measured in bandwidth_row["times"].values():
        times = measured["eager"]
        assert 0 < times["p20_us"] <= times["p50_us"] <= times["p80_us"]
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line["rows"] == 3
    # Nothing that a CPU does meets or misses a target.
    assert set(last_line["targets"].values()) == {None}


def test_rows_survive_when_time_runs_out(tmp_path, monkeypatch):
    passed = chain([False, False], repeat(True))
    monkeypatch.setattr(report_file.Deadline, "passed", lambda self: next(passed))

    status, document = run(tmp_path / "report.json")

    assert status == 0
    assert len(document["rows"]) == 2 and not document["complete"]
    assert [left["context"] for left in document["left_out"]] == [None]


def test_rows_survive_an_interruption(tmp_path, monkeypatch):
    measured = iter([{"kind": "bandwidth", "error": "x"} | vars(Cell("s", 1, 16))])

    def row_of(*_):
        for row in measured:
            return row
        raise KeyboardInterrupt

    monkeypatch.setattr(attention_report, "row_of", row_of)
    path = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        run(path)
    document = json.loads(path.read_text())
    assert len(document["rows"]) == 1 and not document["complete"]
    assert document["provenance"]["versions"]
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_results_are_not_timed(tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        return reference.paged_sparse_attention(*args, **kwargs) * 1.01

    kernels = SimpleNamespace(
        paged_sparse_attention=wrong, paged_cache_write=reference.paged_cache_write
    )
    monkeypatch.setattr(attention_rows, "kernels_for", lambda device: kernels)

    status, document = run(tmp_path / "report.json")

    assert status == 1
    for row in document["rows"]:
        assert row["error"].startswith("RedGateError: relative error 0.01")
        assert "times" not in row


def test_a_rivals_failure_costs_no_row(monkeypatch):
    def broken(workload):
        raise TypeError("another signature")

    monkeypatch.setattr(attention_rows.contenders, "sdpa", broken)
    row = attention_rows.row_of(Cell("llama-68m", 1, 16), CPU, copy_bandwidth=1e9)
    assert row["times"]["sdpa"] == {"error": "TypeError: another signature"}
    assert set(row["speedup_over"]) == {"gather_and_sdpa"}
    assert row["copy_bandwidth_share"] > 0


def test_sweep_says_which_settings_are_best(tmp_path, monkeypatch):
    passed = chain([False] * 3, repeat(True))
    monkeypatch.setattr(report_file.Deadline, "passed", lambda self: next(passed))

    status, document = run(tmp_path / "sweep.json", "--sweep-settings")

    assert status == 0
    in_use, *others = document["rows"]
    assert in_use["settings"] == document["launch_settings"]
    assert in_use["warps"] is None and len(others) == 2
    best = document["best"]
    assert 1 <= best["together"]["over_least"] <= best["in_use"]["over_least"]
    assert set(best["by_cell"]) == {"llama-68m batch 2 budget 32"}
    assert len(document["left_out"]) + 3 == len(
        settings_sweep.candidates(launch_settings.DEFAULT)
    )


def test_best_leaves_out_what_did_not_run():
    rows = [
        {"settings": "a", "warps": None, "times_us": {"x": 10.0, "y": 40.0}},
        {"settings": "b", "warps": 8, "times_us": {"x": 20.0, "y": 10.0}},
        {"settings": "c", "warps": 4, "error": "OutOfResources"},
    ]
    best = settings_sweep.best(rows)
    assert best["together"]["settings"] == "b"
    assert best["together"]["over_least"] == pytest.approx(2**0.5)
    assert best["in_use"]["over_least"] == pytest.approx(2)
    assert best["by_cell"]["x"] == {"settings": "a", "warps": None, "time_us": 10.0}


def test_candidates_are_in_force_inside_only():
    candidate = settings_sweep.Candidate(
        launch_settings.LaunchSettings(programs_per_multiprocessor=4), warps=2
    )
    with settings_sweep.in_force(candidate):
        assert launch_settings.settings_of(CPU) == candidate.settings
        assert launch_settings.warps(64, 2) == 2
        assert launch_settings.attention_splits(1, 100, CPU) == 4
    assert launch_settings.settings_of(CPU) == launch_settings.DEFAULT
    assert launch_settings.warps(64, 2) == 4


def test_splits_are_those_that_hold_tiles():
    with attention_rows.splits_recorded() as recorded:
        with settings_sweep.in_force(
            settings_sweep.Candidate(
                launch_settings.LaunchSettings(programs_per_multiprocessor=5)
            )
        ):
            launch_settings.attention_splits(programs=1, tiles=6, device=CPU)
    assert recorded == [3]  # five parts of two tiles: three have any


def bandwidth_row(batch, share, speedup):
    cell = {"kind": "bandwidth", "shape": "s", "batch": batch, "budget": 2048}
    speedups = {} if speedup is None else {"vllm": speedup}
    return cell | {"copy_bandwidth_share": share, "speedup_over": speedups}


def context_row(context, time_us):
    cell = {"kind": "context", "shape": "s", "batch": 8, "budget": 512}
    times = {"attention": {"eager": {"p50_us": time_us}}}
    return cell | {"context": context, "times": times}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([], (None, None, None), id="nothing"),
        pytest.param([bandwidth_row(8, 0.1, None)], (None, None, None), id="not-due"),
        pytest.param([bandwidth_row(64, 0.8, 1.0)], (True, True, None), id="met"),
        pytest.param(
            [bandwidth_row(64, 0.9, 1.2), bandwidth_row(256, 0.79, 0.99)],
            (False, False, None),
            id="one-missed",
        ),
        pytest.param(
            [vars(Cell("s", 64, 2048)) | {"kind": "bandwidth", "error": "red"}],
            (False, None, None),
            id="not-measured",
        ),
        pytest.param(
            [context_row(1024, 100.0), context_row(131072, 104.0)],
            (None, None, True),
            id="flat",
        ),
        pytest.param(
            [context_row(1024, 100.0), context_row(131072, 106.0)],
            (None, None, False),
            id="not-flat",
        ),
    ],
)
def test_verdicts(rows, expected):
    assert tuple(targets.verdicts(rows).values()) == expected


def num_bytes(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_attention_moves_the_bytes_of_the_pages_held_and_of_both_ends():
    workload = workloads.attention(SHAPE, batch=3, budget=48, device=CPU)
    inputs = workload.sets[0]
    out = reference.paged_sparse_attention(**inputs)
    pages = inputs["page_table"].flatten()
    keys, values = inputs["key_pages"][pages], inputs["value_pages"][pages]
    expected = num_bytes(keys, values, inputs["queries"], out)
    assert workload.moved_bytes == expected
    assert inputs["lengths"].tolist() == [48, 48, 48]


def test_other_operations_move_the_bytes_of_what_they_read_and_write():
    workload = workloads.cache_write(SHAPE, 5, CPU)
    inputs = workload.sets[0]
    ends = [inputs["qkv"]] * 2 + [inputs[name] for name in ("cos", "sin", "cells")]
    reference.paged_cache_write(**inputs)
    assert workload.moved_bytes == num_bytes(*ends)

    workload = workloads.linear(SHAPE, 5, CPU)
    inputs = workload.sets[0]
    ends = [inputs[name] for name in ("x", "weight", "norm")]
    assert workload.moved_bytes == num_bytes(*ends, reference.linear(**inputs))

    workload = workloads.chunk_scores(SHAPE, 100, CPU, num_queries=2)
    inputs = workload.sets[0]
    scores = reference.chunk_scores(**inputs, score="mean_key")
    expected = num_bytes(inputs["keys"], inputs["queries"], scores)
    assert workload.moved_bytes == expected

    workload = workloads.page_compaction(SHAPE, 100, 20, CPU)
    inputs = workload.sets[0]
    reference.page_compaction(**inputs)
    kept = inputs["keys"][:, :20], inputs["values"][:, :20]
    expected = 2 * num_bytes(*kept) + num_bytes(inputs["kept"], inputs["cells"])
    assert workload.moved_bytes == expected

    workload = workloads.token_picks(SHAPE, 3, CPU, sampled=True)
    inputs = workload.sets[0]
    _, _, probabilities = reference.sampled_pick(**inputs)
    assert workload.moved_bytes == num_bytes(inputs["logits"], probabilities)


def test_input_sets_exceed_the_cache_and_share_no_page(monkeypatch):
    monkeypatch.setattr(workloads, "cache_bytes", lambda device: 20_000)
    workload = workloads.attention(SHAPE, batch=2, budget=32, device=CPU)
    assert len(workload.sets) * workload.moved_bytes >= 4 * 20_000
    pages = torch.cat([inputs["page_table"].flatten() for inputs in workload.sets])
    assert len(pages.unique()) == len(pages)
    calls = workload.calls(lambda **inputs: used.append(inputs["page_table"]))
    used = []
    call = workloads.in_turn(calls)
    for _ in range(len(calls) + 1):
        call()
    assert used[0] is used[-1] and used[0] is not used[1]


@pytest.mark.parametrize("context", [64, 4096])
def test_steps_at_any_context_read_the_budget_and_the_token_they_wrote(context):
    built = contexts.build(SHAPE, 2, 32, context, CPU)
    inputs = built.steps.sets[0]
    pages = inputs["attention"]["value_pages"]
    before = pages.clone()

    out = contexts.step(reference, **inputs)

    changed = (pages != before).flatten(2).any(-1).nonzero()
    last_pages = inputs["attention"]["page_table"][:, -1]
    assert sorted(changed[:, 0].tolist()) == sorted(last_pages.tolist())
    assert changed[:, 1].tolist() == [15, 15]
    assert built.pool_tokens == 2 * context
    assert out.shape == (2, 4, 8) and bool(out.isfinite().all())


def test_rotary_angles_are_those_of_the_reference():
    cos, sin = workloads.angles(torch.tensor([0, 3]), 4)
    torch.testing.assert_close(cos[0], torch.ones(4))
    x = torch.tensor([1.0, 0.0, 0.0, 0.0])
    angle = torch.tensor(3.0)
    expected = torch.stack([angle.cos(), angle * 0, angle.sin(), angle * 0])
    torch.testing.assert_close(reference.rotate(x, cos[1], sin[1]), expected)


def test_gate_refuses_what_is_not_a_number():
    wanted = torch.ones(3)
    with pytest.raises(gate.RedGateError, match="relative error nan"):
        gate.require_close(wanted * torch.nan, wanted, torch.float32)


def test_gate_compares_what_is_written_too():
    def writes(pages, number):
        pages.fill_(number)
        return torch.ones(1)

    inputs = {"pages": torch.zeros(2), "number": 1.0}
    gate.require_agreement(writes, writes, inputs, torch.float32)
    assert inputs["pages"].tolist() == [0.0, 0.0]
    with pytest.raises(gate.RedGateError):
        gate.require_agreement(
            lambda pages, number: writes(pages, 2.0), writes, inputs, torch.float32
        )


def test_what_no_graph_can_hold_is_timed_without_one(monkeypatch):
    def refuse(function, rep, quantiles):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def do_bench(function, warmup, rep, quantiles):
        assert quantiles == [0.2, 0.5, 0.8]
        return [0.01, 0.02, 0.03]

    testing = SimpleNamespace(do_bench=do_bench, do_bench_cudagraph=refuse)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(testing=testing))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    found = timing.measure(
        lambda: None, torch.device("cuda"), in_graph=True, num_calls=10
    )

    assert (found.p20_us, found.p50_us, found.p80_us) == pytest.approx((1, 2, 3))
    assert found.timer == "do_bench"
    assert found.note == (
        "not in a CUDA graph: RuntimeError: operation not permitted when stream is "
        "capturing"
    )
