"""The benchmark of what a step costs the host; for its shape, and not for its times."""

import json
import sys

import pytest

pytestmark = pytest.mark.vllm


def test_both_runners_step_without_a_drafter(drafter_folder, tmp_path, monkeypatch):
    from benchmarks.step_host_time import main

    output = tmp_path / "results" / "time.json"
    words = ["--drafter", str(drafter_folder), "--output", str(output)]
    words += ["--batch-sizes", "1", "3", "--steps", "4"]
    rows = [("vllm", 1.0), ("adaptive", 1.5), ("adaptive, random drafter", 0.9)]
    named = [{"method": name, "ratio_to_plain": ratio} for name, ratio in rows]
    lengths = tmp_path / "lengths.json"
    lengths.write_text(json.dumps({"results": named}))
    words += ["--draft-lengths", str(lengths)]
    monkeypatch.setattr(sys, "argv", ["step_host_time", *words])
    main()
    found = json.loads(output.read_text())
    for name in ("v1_batch_1", "v1_none_batch_3", "v2_batch_1", "v2_batch_3"):
        assert len(found[f"{name}_all_ms"]) == 4
        assert 0 < found[f"{name}_ms"] <= max(found[f"{name}_all_ms"])
    assert found["worst_adaptive_over_plain"] == 0.9
    assert "torch" in json.dumps(found["provenance"])
