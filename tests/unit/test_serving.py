"""Methods behind servers, with servers and load that are stubs."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_budgetdraft.comparison import serving
from vllm_budgetdraft.comparison.evaluate import _shortest
from vllm_budgetdraft.comparison.methods import all_methods
from vllm_budgetdraft.comparison.prompts import Prompt
from vllm_budgetdraft.comparison.serving import KEYS, measure_serving

METHODS = all_methods(
    ["budgetdraft"], drafter="d", lengths=[2], budgets=[64], policies=["sink_window"]
)
PROMPTS = {("books", 64): ["a", "b"], ("chat", 9): ["c", "d", "e"]}


class Served:
    """What servers were started with, and what load they had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[dict] = []
        self.loads: list[tuple[dict, list[str], bool]] = []
        monkeypatch.setattr(serving, "_server", self.server)
        monkeypatch.setattr(serving, "_bench", self.bench)

    @contextmanager
    def server(self, engine_args, log, environment):
        self.engines.append(engine_args)
        yield "http://here"

    def bench(self, given, ignore_eos):
        lines = Path(given["--dataset-path"]).read_text().splitlines()
        texts = [json.loads(line)["prompt"] for line in lines]
        self.loads.append((given, texts, ignore_eos))
        speed = 2.0 if "speculative_config" in self.engines[-1] else 1.0
        found = dict.fromkeys(KEYS, 1.0) | {"completed": given["--num-prompts"]}
        return found | {"output_throughput": speed * (1 + given["--temperature"])}


def measured(folder: Path, **changes) -> list[dict]:
    options = {
        "concurrencies": [1, 2],
        "repeats": 1,
        "new_tokens": 8,
        "temperatures": [0.0, 1.0],
        "ignore_eos": False,
    }
    model = {"model": "m"}
    return measure_serving(METHODS, PROMPTS, model, folder, **(options | changes))


def test_every_task_has_its_load_at_each_temperature(tmp_path, monkeypatch):
    served = Served(monkeypatch)
    rows = measured(tmp_path)
    assert len(served.engines) == 2  # one for each method
    assert all(each["generation_config"] == "vllm" for each in served.engines)
    assert len(served.loads) == len(rows) == 2 * 2 * 2 * 2
    for given, texts, ignore_eos in served.loads:
        assert texts in PROMPTS.values() and not ignore_eos
        assert given["--extra-body"] == {"add_special_tokens": False}
        assert given["--num-prompts"] == max(len(texts), 2 * given["--max-concurrency"])
    for row in rows:
        is_ours = row["kind"] == "budgetdraft"
        assert row["speedup"] == (2 if is_ours else 1)
        drawn = "drawn" if row["temperature"] else "greedy"
        assert row["drafts"] == (drawn if is_ours else None)
    places = {(r["task"], r["context_tokens"], r["temperature"]) for r in rows}
    assert places == {(*group, t) for group in PROMPTS for t in (0.0, 1.0)}


def test_a_load_that_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    served = Served(monkeypatch)
    measured(tmp_path, temperatures=[0.0])
    served.loads.clear()
    rows = measured(tmp_path)
    assert {given["--temperature"] for given, _, _ in served.loads} == {1.0}
    assert len(rows) == 16
    served.engines.clear()
    assert measured(tmp_path) == rows and not served.engines


class Words:
    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def test_each_task_is_served_at_its_shortest_context():
    prompts = [
        Prompt("books", length, index, [length, index])
        for length in (64, 32)
        for index in range(2)
    ]
    prompts.append(Prompt("chat", 9, 0, [7]))
    assert _shortest(prompts, Words()) == {
        ("books", 32): ["32 0", "32 1"],
        ("chat", 9): ["7"],
    }
