"""What the demo asks and prints, without an engine."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.support.engines import DRAFTER
from tests.support.stub_engine import NEW_TOKENS, StubEngine
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.comparison import chats, demo
from vllm_budgetdraft.comparison.chats import (
    SHORT_QUESTIONS,
    questions_about_texts,
    short_chats,
)
from vllm_budgetdraft.comparison.prompts import EXCERPT
from vllm_budgetdraft.errors import ConfigurationError

BOOKS = Path(__file__).parents[2] / "models" / "books-9m"
TEMPLATE = (
    "<s>{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(BOOKS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_short_chats_are_questions_in_the_template(tokenizer):
    prompts = short_chats(tokenizer, 2)
    for index, prompt in enumerate(prompts):
        expected = f"<s>{SHORT_QUESTIONS[index]}\nAnswer:"
        assert tokenizer.decode(prompt.token_ids) == expected
        # What the template begins with is not put there a second time.
        assert prompt.token_ids.count(tokenizer.convert_tokens_to_ids("<s>")) <= 1
    assert len({prompt.context_tokens for prompt in prompts}) == 1
    assert prompts[0].context_tokens == max(len(p.token_ids) for p in prompts)


def test_passages_fill_their_prompts_and_follow_one_another(tokenizer):
    length = 300
    prompts = questions_about_texts(tokenizer, length, 3)
    question = chats.QUESTION.format(passage="") + "\nAnswer:"
    excerpt = EXCERPT.read_text(encoding="utf-8")
    found = []
    for prompt in prompts:
        assert length - 5 <= len(prompt.token_ids) <= length
        text = tokenizer.decode(prompt.token_ids)
        assert text.endswith(question)
        found.append(excerpt.index(text.removesuffix(question).removeprefix("<s>")))
    assert found[0] == 0 and found == sorted(set(found))


@pytest.mark.parametrize(
    ("length", "count"), [(5, 1), (4096, 500)], ids=["no room", "too many"]
)
def test_prompts_that_cannot_be_made_are_refused(tokenizer, length, count):
    with pytest.raises(ConfigurationError, match="ask for fewer prompts, or others"):
        questions_about_texts(tokenizer, length, count)


def test_a_model_without_chat_template_is_refused():
    with pytest.raises(ConfigurationError, match="no chat template"):
        short_chats(AutoTokenizer.from_pretrained(BOOKS), 1)


@pytest.mark.parametrize("named", ["target", "drafter"])
def test_a_model_without_the_other_is_refused(named):
    args = {"target": None, "drafter": None, named: "x"}
    with pytest.raises(ConfigurationError, match="name both, or neither"):
        demo.run(Namespace(**args))


def test_answers_are_the_first_of_each_kind(tokenizer, capsys):
    prompts = short_chats(tokenizer, 2) + questions_about_texts(tokenizer, 300, 2)
    texts = ["blue light", "a soup", "a murder", "an inquest"]
    rounds = [
        {"runs": {"ours": {"token_ids": tokenizer(text)["input_ids"]}}}
        for text in texts
    ]
    answers = demo._answers(tokenizer, prompts, rounds, "ours")
    assert [each["answer"].strip() for each in answers] == ["blue light", "a murder"]
    demo.print_answers(answers)
    said = capsys.readouterr().out
    assert SHORT_QUESTIONS[0] in said and "blue light" in said and "a soup" not in said


def test_the_table_has_a_line_for_each_row(capsys):
    row = {
        "task": "short chat",
        "context_tokens": 40,
        "method": "budgetdraft",
        "output_throughput": 31.4,
        "speedup": 1.25,
        "decode_speedup": 1.5,
        "acceptance_length": 2.25,
        "draft_kv_bytes_per_request": 2048,
        "full_draft_kv_bytes": 4096,
        "num_runs": 2,
        "output_identical": 1.0,
        "distinct_4grams": 0.75,
    }
    plain = row | {"method": "vllm", "acceptance_length": None}
    plain |= {"draft_kv_bytes_per_request": None}
    demo.print_table([plain, row])
    lines = capsys.readouterr().out.splitlines()[3:5]
    assert lines[0].split() == "short chat, 40 vllm 31 1.25x 1.50x yes 25%".split()
    expected = "short chat, 40 budgetdraft 31 1.25x 1.50x 2.25 2 KiB 50% yes 25%"
    assert lines[1].split() == expected.split()


def test_it_measures_every_method_and_writes_what_it_prints(
    tmp_path, monkeypatch, capsys
):
    target = tmp_path / "target"
    shutil.copytree(BOOKS, target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    StubEngine.install(monkeypatch)
    monkeypatch.setattr(demo, "preload", lambda: None)
    command = f"demo --target {target} --drafter {DRAFTER} --repeats 2"
    sizes = f"--context-tokens 300 --new-tokens {NEW_TOKENS}"
    file = tmp_path / "demo.json"
    main([*command.split(), *sizes.split(), "--json", str(file)])
    methods = ["vllm", "ngram", "draft_model", "budgetdraft"]
    assert [engine.config["method"] for engine in StubEngine.made] == methods
    assert len(StubEngine.asked) == 2 * 2 * len(methods)
    written = json.loads(file.read_text())
    rows = [(row["task"], row["method"].split()[0]) for row in written["results"]]
    assert rows == [
        (task, m) for task in (chats.SHORT, chats.ABOUT_A_TEXT) for m in methods
    ]
    assert len(written["answers"]) == 2
    assert written["provenance"]["arguments"]["engine_args"]["model"] == str(target)
    said = capsys.readouterr().out
    assert SHORT_QUESTIONS[0] in said and f"Written to {file}" in said
