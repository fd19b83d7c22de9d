"""Methods, prompts, rounds and rows of a comparison; engines are not needed."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.support.books import write_books
from tests.support.engines import DRAFTER, TARGET
from tests.support.stub_engine import StubEngine
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.comparison import methods as methods_module
from vllm_budgetdraft.comparison.evaluate import PROTOCOLS
from vllm_budgetdraft.comparison.measure import RoundsFile, measure
from vllm_budgetdraft.comparison.methods import all_methods
from vllm_budgetdraft.comparison.prompts import EXCERPT, Prompt, build_prompts
from vllm_budgetdraft.comparison.summary import best_lengths, summarise, to_csv
from vllm_budgetdraft.errors import ConfigurationError


def methods_of(kinds=("ngram", "budgetdraft"), **changes):
    given = {
        "drafter": "drafter",
        "lengths": [2, 4],
        "budgets": [64, 256],
        "policies": ["sink_window", "keep_all"],
    }
    return all_methods(kinds, **{**given, **changes})


def test_every_method_comes_with_each_of_its_settings():
    assert [method.name for method in methods_of()] == [
        "vllm",
        "ngram k=2",
        "ngram k=4",
        "budgetdraft sink_window budget=64 k=2",
        "budgetdraft sink_window budget=64 k=4",
        "budgetdraft sink_window budget=256 k=2",
        "budgetdraft sink_window budget=256 k=4",
        "budgetdraft keep_all budget=256 k=2",
        "budgetdraft keep_all budget=256 k=4",
    ]
    *_, last = methods_of(["draft_model"])
    config = last.engine_args["speculative_config"]
    assert config["model"] == "drafter" and config["num_speculative_tokens"] == 4


@pytest.mark.parametrize(
    ("kind", "message"),
    [("medusa", "there is no method 'medusa'"), ("suffix", "arctic-inference")],
)
def test_a_method_that_is_not_there_is_an_error(kind, message, monkeypatch):
    monkeypatch.setattr(methods_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=message):
        methods_of([kind])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TARGET)


def write_meetings(path: Path, num_words: int) -> str:
    rows = [
        {
            "context": " ".join(f"w{i * j % 50}" for i in range(num_words)),
            "input": f"question {j}",
        }
        for j in range(1, 5)
    ]
    with lzma.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def test_prompts_have_exactly_their_length_and_differ(tokenizer, tmp_path):
    write_books(tmp_path / "books.jsonl")
    sources = {
        "books": str(tmp_path / "books.jsonl"),
        "summary": str(EXCERPT),
        "qmsum": write_meetings(tmp_path / "meetings.jsonl.xz", 3000),
    }
    prompts = build_prompts(tokenizer, sources, lengths=[300, 400], count=3)
    assert len(prompts) == 18
    for prompt in prompts:
        assert len(prompt.token_ids) == prompt.context_tokens
    assert len({tuple(prompt.token_ids) for prompt in prompts}) == 18
    assert prompts == build_prompts(tokenizer, sources, lengths=[300, 400], count=3)
    by_task = {p.task: tokenizer.decode(p.token_ids) for p in prompts}
    assert "question" in by_task["qmsum"] and by_task["qmsum"].endswith("Answer:")
    assert by_task["summary"].endswith("Summary:")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"poems": "x"}, "there is no task 'poems'"),
        ({"books": "nowhere.jsonl"}, "names no file"),
        ({"qmsum": "books.jsonl"}, "meetings have 'context'"),
        ({"qmsum": "meetings.jsonl.xz"}, "has 0 meetings of 400 tokens"),
        ({"books": "leaflets.jsonl"}, "no held-out text has more than"),
    ],
)
def test_what_cannot_be_read_is_named(
    tokenizer, tmp_path, monkeypatch, sources, message
):
    monkeypatch.chdir(tmp_path)
    write_books(tmp_path / "books.jsonl")
    write_books(tmp_path / "leaflets.jsonl", num_words=10)
    write_meetings(tmp_path / "meetings.jsonl.xz", 20)
    with pytest.raises(ConfigurationError, match=message):
        build_prompts(tokenizer, sources, lengths=[400], count=2)


def test_a_prompt_without_room_for_its_instructions_is_refused(tokenizer):
    with pytest.raises(ConfigurationError, match="no room"):
        build_prompts(tokenizer, {"summary": str(EXCERPT)}, lengths=[10], count=1)


def run_of(seconds: float, tokens: list[int], accepted: list[int]) -> dict:
    return {
        "seconds": seconds + 1,
        "decode_seconds": seconds,
        "token_ids": tokens,
        "text": "",
        "num_drafts": 4 if accepted else 0,
        "accepted_per_position": accepted,
    }


def a_round(index: int, seconds: float, tokens: list[int]) -> dict:
    plain, fast = "vllm", "ngram k=2"
    engine = {"peak_memory_bytes": 5, "kv_cache_tokens": 7}
    return {
        "task": "books",
        "context_tokens": 100,
        "index": index,
        "temperature": 0.0,
        "prompt_tokens": 100,
        "group": [plain, fast],
        "runs": {
            plain: run_of(10.0, list(range(21)), []),
            fast: run_of(seconds, tokens, [4, 2]),
        },
        "profiles": {fast: {"draft": 1.0, "verify": 2.0, "rest": 1.0}},
        "engines": {plain: engine, fast: engine},
    }


def rows_of(rounds: list[dict]) -> dict[str, dict]:
    methods = methods_of(["ngram"], lengths=[2])
    return {row["method"]: row for row in summarise(methods, rounds)}


def test_an_interval_of_acceptance_is_that_of_other_prompts_alike():
    rng = np.random.default_rng(1)
    rounds = []
    for index in range(200):
        each = a_round(index, 5.0, [1] * 21)
        accepted = [int(rng.integers(5)), 0]  # of 4 drafts
        each["runs"]["ngram k=2"] |= {"accepted_per_position": accepted}
        rounds.append(each)
    row = rows_of(rounds)["ngram k=2"]
    # 0 to 4 of 4 are 0.5 on average, and vary by 1.41 / 4 between prompts.
    width = 2 * 1.96 * (2**0.5 / 4) / 200**0.5
    low, high = row["acceptance_length_low"], row["acceptance_length_high"]
    assert low < row["acceptance_length"] < high
    assert high - low == pytest.approx(width, rel=0.15)


def test_rows_are_medians_of_pairs():
    same = list(range(21))
    rounds = [a_round(0, 5.0, same), a_round(1, 2.0, same), a_round(2, 4.0, [1] * 21)]
    rows = rows_of(rounds)
    row = rows["ngram k=2"]
    assert row["decode_speedup"] == pytest.approx(2.5)
    assert row["decode_speedup_p20"] == pytest.approx(2.2)
    assert row["decode_speedup_p80"] == pytest.approx(4.0)
    assert row["speedup"] == pytest.approx(11 / 5)
    assert row["output_throughput"] == pytest.approx(21 / 5)
    assert row["ttft_ms"] == pytest.approx(1000)
    assert row["tpot_ms"] == pytest.approx(200)
    assert row["acceptance_length"] == pytest.approx(1.5 + 1)
    assert row["acceptance_per_position"] == [1.0, 0.5]
    # Each prompt has as many, and so has any choice of them.
    assert row["acceptance_length_low"] == row["acceptance_length_high"] == 2.5
    assert row["output_identical"] == pytest.approx(2 / 3)
    assert row["distinct_4grams"] == pytest.approx((1 + 1 + 1 / 18) / 3)
    assert row["verify_share"] == pytest.approx(0.5)
    plain = rows["vllm"]
    assert plain["speedup"] == 1 and plain["acceptance_length"] is None
    assert plain["draft_share"] is None
    lines = to_csv(list(rows.values())).splitlines()
    assert len(lines) == 3 and "1.0000 0.5000" in lines[2]


def test_the_best_length_of_each_setting_is_kept():
    rows = list(rows_of([a_round(0, 5.0, [0] * 21)]).values())
    faster = {**rows[1], "method": "ngram k=4", "speedup": 9.0}
    assert best_lengths([*rows, faster]) == [rows[0], faster]


def test_a_line_that_was_cut_short_is_written_again(tmp_path):
    path = tmp_path / "rounds.jsonl"
    RoundsFile(path).append({"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b"')
    again = RoundsFile(path)
    assert again.read() == [{"a": 1}]
    again.append({"a": 3})
    assert RoundsFile(path).read() == [{"a": 1}, {"a": 3}]
    path.write_text('{"to')
    assert RoundsFile(path).read() == []


def test_only_what_is_missing_is_measured_and_turns_alternate(tmp_path, monkeypatch):
    StubEngine.install(monkeypatch)
    methods = methods_of(budgets=[64], policies=["sink_window"], drafter=DRAFTER)
    prompts = [Prompt("books", 5, i, [i] * 5) for i in range(2)]
    options = {"new_tokens": 8, "temperatures": [0.0], "engines_at_once": 4}

    def go_on(some):
        file = RoundsFile(tmp_path / "rounds.jsonl")
        measure(methods, some, {"model": TARGET}, file, **options)
        return file.read()

    (first,) = go_on(prompts[:1])
    assert set(first["runs"]) == {method.name for method in methods}
    assert set(first["profiles"]) == set(first["runs"])
    asked = list(StubEngine.asked)
    assert [method for method, _, _ in asked] == [m.kind for m in methods]
    assert [length for _, length, _ in asked[-2:]] == [2, 4]
    first_again, second = go_on(prompts)
    assert first_again == first and second["index"] == 1
    assert not second["profiles"]
    assert {prompt for _, _, prompt in StubEngine.asked[len(asked) :]} == {1}
    assert len(summarise(methods, go_on(prompts))) == len(methods)
    both = measure_order(methods, tmp_path, options)
    assert both[0][0] == "vllm" and both[len(methods)][0] == "ngram"


def test_a_run_goes_on_whatever_engines_there_is_room_for(tmp_path, monkeypatch):
    StubEngine.install(monkeypatch)
    methods = methods_of(["ngram"], lengths=[1, 2, 3])
    prompts = [Prompt("books", 5, i, [i] * 5) for i in range(3)]
    file = RoundsFile(tmp_path / "rounds.jsonl")

    def go_on(some, engines_at_once):
        StubEngine.asked.clear()
        options = {"new_tokens": 8, "temperatures": [0.0], "profiles": False}
        args = {"model": TARGET}
        measure(methods, some, args, file, engines_at_once=engines_at_once, **options)
        return sorted(StubEngine.asked)

    go_on(prompts[:1], 3)
    go_on(prompts[:2], 1)
    # The file of one that was cut short has two methods' runs of the second prompt.
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_text("".join(lines[:-1]))
    plain, ngram = [("vllm", 0, i) for i in range(3)], "ngram"
    assert go_on(prompts[:2], 2) == [(ngram, 3, 1), plain[1]]
    third = [(ngram, length, 2) for length in (1, 2, 3)]
    assert go_on(prompts, 2) == [*third, plain[2], plain[2]]
    assert go_on(prompts, 3) == []
    assert all("vllm" in each["runs"] for each in file.read())
    rows = {row["method"]: row for row in summarise(methods, file.read())}
    assert [rows[each.name]["num_runs"] for each in methods[1:]] == [3, 3, 3]


def measure_order(methods, folder, options):
    StubEngine.asked.clear()
    prompts = [Prompt("books", 5, i, [i] * 5) for i in range(2)]
    measure(
        methods,
        prompts,
        {"model": TARGET},
        RoundsFile(folder / "others.jsonl"),
        **options,
    )
    return StubEngine.asked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--target ./nowhere", "'./nowhere' cannot be read"),
        ("--data books=nowhere.jsonl", "names no file"),
        ("--data books", "is not TASK=SOURCE"),
        ("--methods medusa", "there is no method 'medusa'"),
        ("--context-tokens 16384", "exceed the target's 16384 positions"),
        ("--temperature 0 -1", "'-1' is no number from 0 on"),
        ("--chat-template x --skip-chat-template", "not allowed with argument"),
        ("--new-tokens 8", "was begun with target='other', not"),
    ],
)
def test_what_is_wrong_is_said_before_an_engine_starts(
    given, message, tmp_path, capsys, monkeypatch
):
    from vllm_budgetdraft.comparison import engine_process
    from vllm_budgetdraft.comparison import measure as module

    monkeypatch.setattr(module, "measure", None)
    monkeypatch.setattr(module, "prepare_environment", lambda: None)
    monkeypatch.setattr(engine_process, "preload", lambda: None)
    (tmp_path / "run.json").write_text('{"target": "other"}')
    command = f"evaluate --output {tmp_path} {given}"
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_protocol_of_the_paper_is_one_word():
    assert PROTOCOLS["paper"]["context_tokens"] == [4096, 8192, 16384]
    assert PROTOCOLS["paper"]["kv_budgets"] == [256, 512, 1024, 2048]


def test_the_synchronous_vllm_has_an_engine_and_circumstances_of_its_own():
    plain, synchronous = methods_of(["vllm", "vllm_sync"])
    assert synchronous.engine_args == {"async_scheduling": False}
    assert synchronous.environment == {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert plain.environment == {}
