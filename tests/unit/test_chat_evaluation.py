"""Chats, chat templates and temperatures of a comparison, without an engine."""

import json
from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.support.engines import DRAFTER, TARGET
from tests.support.stub_engine import StubEngine
from tests.unit.test_comparison import write_meetings
from vllm_budgetdraft.comparison.measure import RoundsFile, measure
from vllm_budgetdraft.comparison.methods import Method, all_methods
from vllm_budgetdraft.comparison.notes import Circumstances, notes
from vllm_budgetdraft.comparison.prompts import EXCERPT, Prompt, build_prompts
from vllm_budgetdraft.comparison.summary import summarise
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.questions import first_question, questions

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] "
    "{{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ],
    "conversations": [{"from": "human", "value": "Why?"}],
    "turns": ["Why?", "And why that?"],
    "prompt": "Why?",
    "question": "Why?",
}
ASKED = {"role": "user", "content": "Why?"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("column", ROWS)
def test_the_first_question_of_each_kind_of_row_is_asked(column):
    messages = first_question({"id": 1, column: ROWS[column]})
    system = [{"role": "system", "content": "Be brief."}]
    assert messages == [*(system if column == "messages" else []), ASKED]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a book"},
        {"question": " "},
        {"messages": [{"role": "system", "content": "Be brief."}]},
        {"prompt": [1, 2, 3]},  # tokens, which budgetdraft generate writes
    ],
)
def test_a_row_without_a_question_is_none(row):
    assert first_question(row) == []


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_chats_are_as_long_as_they_are_and_who_is_left_out_is_said(tokenizer, tmp_path):
    texts = ["Why?", "How do birds fly?", "word " * 400, " "]
    source = write_rows(tmp_path / "q.jsonl", [{"question": each} for each in texts])
    said = []
    prompts = build_prompts(
        tokenizer,
        {"chat": source},
        lengths=[60, 100],
        count=2,
        uses_template=True,
        tell=said.append,
    )
    found = {tokenizer.decode(each.token_ids) for each in prompts}
    head = tokenizer.bos_token or ""
    assert found == {f"{head}[user] {each}\n[assistant]" for each in texts[:2]}
    lengths = {len(each.token_ids) for each in prompts}
    assert len(lengths) == 2
    assert {each.context_tokens for each in prompts} == {max(lengths)}
    # Rows are asked in random order, until there are enough.
    options = {"longest": 100, "uses_template": True, "tell": said.append}
    with pytest.raises(
        ConfigurationError, match="2 questions that can be asked, 3 are"
    ):
        questions(tokenizer, source, count=3, rng=Random(0), **options)
    said.clear()
    for seed in range(20):
        questions(tokenizer, source, count=2, rng=Random(seed), **options)
    assert any("1 of more than 100 tokens" in line for line in said)
    assert any("1 without a question" in line for line in said)


def test_chats_without_a_template_are_refused_or_asked_as_they_are(tmp_path):
    source = write_rows(tmp_path / "q.jsonl", [{"prompt": "Once upon a time"}])
    plain = AutoTokenizer.from_pretrained(TARGET)
    options = {"lengths": [100], "count": 1}
    with pytest.raises(ConfigurationError, match="chat template"):
        build_prompts(plain, {"chat": source}, uses_template=True, **options)
    (prompt,) = build_prompts(plain, {"chat": source}, **options)
    assert prompt.token_ids == plain("Once upon a time")["input_ids"]


def test_passages_in_the_template_have_exactly_their_length(tokenizer, tmp_path):
    meetings = write_meetings(tmp_path / "meetings.jsonl", 3000)
    sources = {"books": str(EXCERPT), "summary": str(EXCERPT), "qmsum": meetings}
    options = {"lengths": [300], "count": 2}
    prompts = build_prompts(tokenizer, sources, uses_template=True, **options)
    assert [len(prompt.token_ids) for prompt in prompts] == [300] * 6
    ends = {
        "books": "in the words of its author.\n[assistant]",
        "summary": "Summary:\n[assistant]",
        "qmsum": "Answer:\n[assistant]",
    }
    for prompt in prompts:
        text = tokenizer.decode(prompt.token_ids)
        assert text.startswith((tokenizer.bos_token or "") + "[user] ")
        assert text.endswith(ends[prompt.task])
    bare = build_prompts(tokenizer, {"books": str(EXCERPT)}, **options)
    assert "[user]" not in tokenizer.decode(bare[0].token_ids)


@pytest.mark.parametrize("template", ["no message", TEMPLATE + TEMPLATE])
def test_a_template_that_has_no_place_for_a_passage_is_refused(template):
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = template
    options = {"lengths": [300], "count": 1, "uses_template": True}
    with pytest.raises(ConfigurationError, match="must stand in it once"):
        build_prompts(tokenizer, {"books": str(EXCERPT)}, **options)


def methods_of(*kinds: str) -> list[Method]:
    return all_methods(
        kinds, drafter=DRAFTER, lengths=[2], budgets=[64], policies=["sink_window"]
    )


def test_each_temperature_is_measured_without_a_seed_and_goes_on(tmp_path, monkeypatch):
    sampled = []

    class Remembering(StubEngine):
        def generate(self, prompt, sampling):
            sampled.append(sampling)
            return super().generate(prompt, sampling)

    Remembering.install(monkeypatch)
    methods = methods_of("draft_model", "budgetdraft")
    prompts = [Prompt("chat", 9, i, [i] * (8 + i)) for i in range(2)]
    file = RoundsFile(tmp_path / "rounds.jsonl")

    def go_on(*temperatures: float) -> list[dict]:
        options = {"new_tokens": 8, "temperatures": temperatures, "engines_at_once": 4}
        measure(methods, prompts, {"model": TARGET}, file, **options)
        return file.read()

    first = go_on(0.0)
    sampled.clear()
    both = go_on(0.0, 0.7)
    assert both[: len(first)] == first and len(both) == 4
    assert {each["temperature"] for each in sampled} == {0.7}
    assert all(each.get("seed") is None for each in sampled)
    assert [bool(each["profiles"]) for each in both] == [True, False] * 2
    sampled.clear()
    go_on(0.7, 0.0)
    assert not sampled
    rows = summarise(methods, both)
    places = {(row["kind"], row["temperature"], row["drafts"]) for row in rows}
    assert places == {
        *(
            ("vllm", 0, None),
            ("draft_model", 0, "greedy"),
            ("budgetdraft", 0, "greedy"),
        ),
        ("vllm", 0.7, None),
        *(("draft_model", 0.7, "greedy"), ("budgetdraft", 0.7, "drawn")),
    }
    for row in rows:
        assert row["num_runs"] == 2 and row["prompt_tokens"] == 8.5
        assert row["output_identical"] == (None if row["temperature"] else 1)


def test_speedups_are_of_tokens_where_answers_end_at_different_places():
    def run(tokens: int, seconds: float) -> dict:
        return {
            "seconds": 1 + seconds,
            "decode_seconds": seconds,
            "token_ids": list(range(tokens)),
            "num_drafts": 0,
            "accepted_per_position": [],
        }

    def row_of(plain: dict, ngram: dict) -> dict:
        engine = {"peak_memory_bytes": 1, "kv_cache_tokens": 1}
        names = ("vllm", "ngram k=2")
        place = {"task": "chat", "context_tokens": 9, "prompt_tokens": 9}
        a_round = {
            **(place | {"index": 0, "temperature": 1.0, "profiles": {}}),
            "runs": dict(zip(names, (plain, ngram), strict=True)),
            "engines": dict.fromkeys(names, engine),
        }
        return summarise(methods_of("ngram"), [a_round])[1]

    row = row_of(run(21, 10.0), run(6, 1.0))
    assert row["decode_speedup"] == pytest.approx(5 / (20 / 10))
    assert row["speedup"] == pytest.approx((6 / 2) / (21 / 11))
    assert row["new_tokens"] == 6
    row = row_of(run(21, 10.0), run(1, 0.0))
    assert row["decode_speedup"] is None and row["decode_speedup_p20"] is None
    assert row["speedup"] == pytest.approx(1 / (21 / 11))


def test_what_is_drawn_and_in_which_template_is_said():
    run = Circumstances(
        methods=methods_of("draft_model", "budgetdraft"),
        tasks=["chat"],
        temperatures=[0.0, 0.7, 1.0],
        chat_template="my.jinja",
        cost_padded=None,
        enforce_eager=False,
    )
    said = " ".join(notes(run))
    assert "At temperature 0.7 and 1 requests have no seed." in said
    assert "Drafts of budgetdraft are then drawn" in said
    assert "Drafts of draft_model are greedy even then" in said
    assert "chat template of my.jinja" in said
