"""Outputs that part: how close the race was, and how a comparison counts it."""

import pytest

from tests.support.engines import DRAFTER, TARGET
from tests.support.stub_engine import StubEngine
from vllm_budgetdraft.comparison.measure import RoundsFile, measure
from vllm_budgetdraft.comparison.methods import all_methods
from vllm_budgetdraft.comparison.prompts import Prompt
from vllm_budgetdraft.comparison.races import describe, race, races_of, step_at
from vllm_budgetdraft.comparison.summary import same, summarise


class Target:
    """Whose logits are given."""

    def __init__(self, logits: dict[int, float]) -> None:
        self.ranked = sorted(logits.items(), key=lambda each: -each[1])
        self.asked: list[tuple[list[int], list[int]]] = []

    def logits(self, prompt, tokens):
        self.asked.append((prompt, tokens))
        kept = {*tokens, *(token for token, _ in self.ranked[:2])}
        return [each for each in self.ranked if each[0] in kept]


def test_steps_are_those_of_the_types():
    torch = pytest.importorskip("torch")
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        for value in (0.3, 1.0, 3.9, 15.99, 16.0, -16.0, 100.0):
            near = torch.tensor(value, dtype=dtype).abs()
            after = torch.nextafter(near, torch.tensor(float("inf"), dtype=dtype))
            assert step_at(near.item(), name) == (after - near).item(), (name, value)
    assert step_at(16.0, "bfloat16") == 0.125 and step_at(0.0, "float16") == 0


@pytest.mark.parametrize(
    ("logits", "dtype", "gap", "limit", "is_tie"),
    [
        ({5: 16.125, 6: 16.0}, "bfloat16", 0.125, 0.125, True),
        ({5: 16.25, 6: 16.0}, "bfloat16", 0.25, 0.125, False),
        ({5: 16.125, 6: 16.0}, "float16", 0.125, 1 / 64, False),
        ({5: 0.5, 6: 0.4921875}, "float16", 1 / 128, 0.01, True),
        ({5: 2.0, 6: 2.0}, "bfloat16", 0.0, 1 / 64, True),
        # The one that was chosen is not among the two best.
        ({7: 9.0, 5: 9.0, 6: 4.0}, "bfloat16", 5.0, 1 / 16, False),
        ({7: 9.0, 5: 8.9375, 6: 8.875}, "bfloat16", 0.125, 1 / 16, False),
    ],
)
def test_a_race_is_as_close_as_the_lower_of_those_chosen(
    logits, dtype, gap, limit, is_tie
):
    target = Target(logits)
    found = race(target, dtype, [1, 2], [3, 4, 5, 9], [3, 4, 6, 9])
    assert target.asked == [([1, 2, 3, 4], [5, 6])]
    assert found is not None and found["position"] == 2
    assert (found["plain_token"], found["token"]) == (5, 6)
    assert found["logits"] == target.ranked
    assert (found["gap"], found["limit"]) == pytest.approx((gap, limit))
    assert found["is_tie"] == is_tie
    assert ("NOT a tie" in describe(found)) != is_tie
    assert f"a gap of {gap:.3g} is" in describe(found)


def test_there_is_no_race_where_nothing_differs_or_no_rounding_explains_it():
    target = Target({5: 1.0, 6: 1.0})
    outputs = {"vllm": [5, 5], "same": [5, 5], "other": [5, 6]}
    assert set(races_of(target, "float16", [1], outputs)) == {"other"}
    assert races_of(target, "float32", [1], outputs) == {}
    assert len(target.asked) == 1


def measured(tmp_path, monkeypatch, *, dtype: str, temperature: float = 0.0):
    """Rounds and rows by kind, where ngram says something else on every prompt."""
    StubEngine.install(
        monkeypatch, dtype=dtype, outputs={"ngram": [0, 1, 2, 9, 9, 9, 9, 9]}
    )
    methods = all_methods(
        ["ngram", "budgetdraft"],
        drafter=DRAFTER,
        lengths=[2],
        budgets=[64],
        policies=["sink_window"],
    )
    file = RoundsFile(tmp_path / "rounds.jsonl")
    prompts = [Prompt("books", 5, i, [i] * 5) for i in range(2)]
    options = {"new_tokens": 8, "temperatures": [temperature], "engines_at_once": 4}
    measure(methods, prompts, {"model": TARGET}, file, profiles=False, **options)
    rounds = file.read()
    return rounds, {row["kind"]: row for row in summarise(methods, rounds)}, methods


def test_a_comparison_in_half_precision_asks_plain_vllm_and_counts_ties(
    tmp_path, monkeypatch, capsys
):
    rounds, rows, methods = measured(tmp_path, monkeypatch, dtype="bfloat16")
    plain, *others = StubEngine.made
    assert plain.races == [([i] * 5 + [0, 1, 2], [3, 9]) for i in range(2)]
    assert not any(engine.races for engine in others)
    assert [list(each["races"]) for each in rounds] == [["ngram k=2"]] * 2
    assert "0.0625 is a tie within rounding (0.0625)" in capsys.readouterr().err
    assert [same(rows[kind]) for kind in ("vllm", "ngram", "budgetdraft")] == [
        *("yes", "2 ties", "yes")
    ]
    assert rows["ngram"]["output_gap"] == 0.0625
    assert rows["budgetdraft"]["output_gap"] is None
    rounds[0]["races"]["ngram k=2"]["is_tie"] = False
    row = next(r for r in summarise(methods, rounds) if r["kind"] == "ngram")
    assert same(row) == "NO (1), 1 tie"


def test_at_a_temperature_outputs_are_not_compared(tmp_path, monkeypatch):
    rounds, rows, _ = measured(tmp_path, monkeypatch, dtype="bfloat16", temperature=1.0)
    assert not any(engine.races for engine in StubEngine.made)
    assert all(each["temperature"] == 1 for each in rounds)
    assert rows["ngram"]["output_identical"] is None and same(rows["ngram"]) == ""


def test_without_a_race_every_difference_counts_as_one(tmp_path, monkeypatch):
    rounds, rows, methods = measured(tmp_path, monkeypatch, dtype="float32")
    assert not any(engine.races for engine in StubEngine.made)
    assert same(rows["ngram"]) == "NO (2)" and rows["ngram"]["output_ties"] == 0
    for each in rounds:  # as they were before there were races
        del each["races"]
    assert summarise(methods, rounds) == list(rows.values())
    del rows["ngram"]["output_ties"], rows["ngram"]["output_gap"]
    assert same(rows["ngram"]) == "NO (2)"
