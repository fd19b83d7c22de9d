"""Conversations that a target writes anew, with a target that answers at once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, Gemma3Config, PreTrainedTokenizerBase

from tests.support.engines import TARGET
from tests.unit.test_conversations import CHATML, THINKING, WHY, make_tokenizer
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.generation import chats
from vllm_budgetdraft.generation.chats import Chat, write_chats
from vllm_budgetdraft.generation.engine import Engine, Written
from vllm_budgetdraft.training.sources import read_continuations

LONGEST = 120


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(CHATML)


class Target:
    """Answers with a letter for each turn so far, and remembers what it was asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str = "Yes.") -> None:
        self.tokenizer, self.text = tokenizer, text
        self.asked: list[tuple[str, float, int]] = []

    def write(
        self, prompts: list[list[int]], temperatures: list[float], seeds: list[int]
    ) -> list[Written]:
        found = []
        for prompt, temperature, seed in zip(prompts, temperatures, seeds, strict=True):
            asked = self.tokenizer.decode(prompt)
            self.asked.append((asked, temperature, seed))
            has_ended = "forever" not in asked.split("<user>")[-1]
            end = self.tokenizer.eos_token if has_ended else ""
            ids = self.tokenizer(self.text + end, add_special_tokens=False)["input_ids"]
            found.append(Written(list(ids), has_ended, {}))
        return found


def chat(*users: str, temperature: float = 0.0, name: str = "0 0") -> Chat:
    return Chat({"turns": list(users)}, name, temperature)


def test_each_turn_follows_what_the_target_wrote_itself(tokenizer):
    target = Target(tokenizer)
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            WHY,
            {"role": "assistant", "content": "Somebody else's."},
            {"role": "user", "content": "And?"},
        ]
    }
    rows, ends = write_chats([Chat(row, "0 0", 0.5)], tokenizer, target.write, LONGEST)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    first = f"{begin}<system>Be brief.{end}\n<user>Why?{end}\n<assistant>"
    second = f"{first}Yes.{end}\n<user>And?{end}\n<assistant>"
    assert [tokenizer.decode(row["prompt"]) for row in rows] == [first, second]
    assert [tokenizer.decode(row["continuation"]) for row in rows] == [f"Yes.{end}"] * 2
    assert {row["temperature"] for row in rows} == {0.5}
    assert ends == {chats.COMPLETE: 1, chats.ANSWERS: 2}


def test_thoughts_are_left_out_where_the_template_leaves_them_out():
    tokenizer = make_tokenizer(THINKING)
    target = Target(tokenizer, "Hm.</think>Yes.")
    rows, _ = write_chats([chat("Why?", "And?")], tokenizer, target.write, LONGEST)
    prompt = tokenizer.decode(rows[1]["prompt"])
    assert "Yes." in prompt and "Hm." not in prompt


def test_every_conversation_ends_in_one_way(tokenizer):
    given = [
        chat("Why?"),
        chat("Go on forever", "And?"),
        chat("Why?", "word " * 200),
        chat("word " * 200, "Why?"),
        chat(" "),
        chat(),
        Chat({"messages": [{"role": "tool", "content": "4"}]}, "0 0", 0.0),
    ]
    rows, ends = write_chats(given, tokenizer, Target(tokenizer).write, LONGEST)
    assert [each.end for each in given] == [
        chats.COMPLETE,
        chats.COMPLETE,
        chats.TOO_LONG,
        chats.TOO_LONG,
        chats.EMPTY,
        chats.EMPTY,
        chats.MALFORMED,
    ]
    assert sum(ends[each] for each in chats.ENDS) == len(given)
    assert ends[chats.ANSWERS] == len(rows) == 4 and ends[chats.CUT] == 1
    assert given[-1].why == "a message by 'tool'"


def test_a_draw_depends_on_its_conversation_temperature_and_turn_alone(tokenizer):
    def seeds(*given: Chat) -> dict[str, int]:
        target = Target(tokenizer)
        write_chats(list(given), tokenizer, target.write, LONGEST)
        return {f"{asked} {t}": seed for asked, t, seed in target.asked}

    alone = seeds(chat("Why?", "And?", name="0 1"))
    beside = seeds(
        chat("How?", "What?", name="0 0"),
        chat("Why?", "And?", name="0 1"),
        chat("Why?", "And?", name="0 1", temperature=1.0),
    )
    assert alone.items() <= beside.items()
    assert len(set(beside.values())) == len(beside) == 6


def test_a_run_that_was_killed_goes_on_and_its_counts_add_up(
    tmp_path: Path, monkeypatch, capsys
):
    """Conversations of several files, at two temperatures."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = CHATML
    file = tmp_path / "chats.jsonl"
    rows = [{"turns": [f"Question {i}?", "And?", "Why?"]} for i in range(10)]
    rows[3] = {"turns": []}
    rows[4] = {"turns": ["Go on forever", "And?"]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    killed_at = [0]

    class Engine(Target):
        def __init__(self, args, max_model_len, *, draws) -> None:
            assert max_model_len == 1000 and draws
            super().__init__(tokenizer)

        def write(self, prompts, temperatures, seeds):
            killed_at[0] -= 1
            if killed_at[0] == 0:
                raise KeyboardInterrupt
            return super().write(prompts, temperatures, seeds)

    monkeypatch.setattr(chats, "Engine", Engine)

    def generate(output: str) -> list[dict]:
        sizes = "--prompts-per-file 4 --max-model-len 1000 --new-tokens 20"
        options = f"--temperature 0 1 --chat-template {template} {sizes}"
        command = f"generate --target {TARGET} --conversations {file} {options}"
        main([*command.split(), "--output", str(tmp_path / output)])
        return list(read_continuations([str(tmp_path / output)]))

    expected = generate("whole")
    said = capsys.readouterr().out
    # Eight of three turns, one of two whose first answer is cut, at two temperatures.
    assert len(expected) == 2 * (8 * 3 + 2)
    ends = "18 complete, 0 too long, 2 empty, 0 malformed"
    assert (
        f"10 conversations at 2 temperatures: {ends}; "
        "52 answers, 2 of them cut at --new-tokens" in said
    )
    killed_at[0] = 5  # in the second file
    with pytest.raises(SystemExit) as stop:
        generate("killed")
    assert stop.value.code == 130
    assert "the same command writes the others" in capsys.readouterr().err
    assert len(list((tmp_path / "killed").glob("part-*.parquet"))) == 1
    assert generate("killed") == expected
    assert f"{ends}; 52 answers" in capsys.readouterr().out
    counts = [
        json.loads((tmp_path / x / "counts.json").read_text())
        for x in ("whole", "killed")
    ]
    assert counts[0] == counts[1]
    (tmp_path / "whole" / "counts.json").unlink()
    assert generate("whole") == expected, "and none is known"


def test_positions_of_a_model_of_text_and_images_are_its_texts(tmp_path: Path):
    text = {"max_position_embeddings": 4096}
    Gemma3Config(text_config=text).save_pretrained(tmp_path)
    assert chats._positions_of(str(tmp_path)) == 4096


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "--max-model-len 99999",
            "leave no prompt within the target's 16384 positions",
        ),
        ("--max-model-len 64 --new-tokens 64", "leave no prompt"),
        ("--teacher-forced --top-logprobs 4", "--conversations are written anew"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, capsys, more, message):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"turns": ["Why?"]}) + "\n")
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    command = f"generate --target {TARGET} --conversations {file} {more}"
    output = ("--output", str(tmp_path / "out"), "--chat-template", str(template))
    with pytest.raises(SystemExit):
        main([*command.split(), *output])
    assert message in capsys.readouterr().err


def test_an_engine_that_is_interrupted_is_ended_first():
    """What its own process says then comes before how to go on."""

    def interrupted(*_):
        raise KeyboardInterrupt

    ended = []
    core = SimpleNamespace(shutdown=lambda: ended.append(True))
    engine = object.__new__(Engine)
    engine._llm = SimpleNamespace(
        generate=interrupted, llm_engine=SimpleNamespace(engine_core=core)
    )
    with pytest.raises(KeyboardInterrupt):
        engine._generate([[1]], None)
    assert ended == [True]
