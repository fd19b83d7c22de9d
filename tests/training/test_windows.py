"""Windows are cut from where they should be, from any kind of file."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from tests.support.books import WORDS, write_books, write_target
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.chats import read_conversations
from vllm_budgetdraft.training.objectives import IGNORED
from vllm_budgetdraft.training.sources import (
    open_source,
    read_continuations,
    read_texts,
    unwrap,
)
from vllm_budgetdraft.training.token_streams import TokenStream
from vllm_budgetdraft.training.windows import TokenWindows

CONTINUATION = 12
#: Prompts of 50, and 20 or 11 tokens that the target wrote, with the two likeliest.
LONG = {"prompt": list(range(50)), "continuation": list(range(60, 80))}
SHORT = {"prompt": list(range(50)), "continuation": list(range(11))}
for record in (LONG, SHORT):
    tokens = record["continuation"]
    record["top_ids"] = [[token, token + 1] for token in tokens]
    record["top_logprobs"] = [[-0.5, -float(token + 1)] for token in tokens]
PLAIN = [{k: r[k] for k in ("prompt", "continuation")} for r in (LONG, SHORT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_target(folder / "target")
    write_books(folder / "books.jsonl")
    write_books(folder / "leaflets.jsonl", num_words=10)
    for name, records in (("plain", PLAIN), ("long", [LONG]), ("both", [LONG, SHORT])):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "target")


def windows(texts, continuations=None, **changes) -> TokenWindows:
    arguments = {
        "prefix_tokens": [8, 30],
        "continuation_tokens": CONTINUATION,
        "on_policy_fraction": 1.0,
        "windows_per_step": 3,
        "num_windows": 60,
        "seed": 0,
    }
    return TokenWindows(texts, continuations, **{**arguments, **changes})


@pytest.fixture(scope="module")
def books(folder, tokenizer):
    return read_texts([str(folder / "books.jsonl")], tokenizer)


@pytest.fixture(scope="module")
def written(folder):
    return read_continuations([str(folder / "long.jsonl")])


def whole(window: dict) -> list[int]:
    return torch.cat([window["prefix_ids"], window["continuation_ids"]]).tolist()


def test_all_windows_of_a_step_share_a_prefix_length_and_every_length_is_drawn(books):
    batches = list(DataLoader(windows(books), batch_size=3))
    assert len(batches) == 20
    drawn = {batch["prefix_ids"].shape[1] for batch in batches}
    assert drawn == {8, 30}
    for batch in batches:
        assert batch["continuation_ids"].shape == (3, CONTINUATION)
        assert batch["counted"].all()


def test_where_a_temperature_is_unknown_it_is_1(books, written):
    for dataset in (windows(books), windows(None, written)):
        assert dataset[0]["temperatures"].tolist() == [1.0] * CONTINUATION


def test_windows_are_pieces_of_the_texts_from_all_over_them(books, folder):
    lines = (folder / "books.jsonl").read_text().splitlines()
    texts = " ".join(json.loads(line)["text"] for line in lines)
    starts = []
    for window in windows(books):
        assert "next_ids" not in window
        passage = " ".join(WORDS[token] for token in whole(window))
        assert passage in texts
        starts.append(texts.index(passage) / len(texts))
    assert min(starts) < 0.1 and max(starts) > 0.9
    assert 0.35 < sum(starts) / len(starts) < 0.65


def test_a_window_knows_its_number(books):
    assert [int(window["window"]) for window in windows(books)] == list(range(60))


def test_a_seed_gives_the_same_windows_in_any_order(books):
    first, again = windows(books), windows(books)
    backwards = [again[index] for index in reversed(range(20))][::-1]
    assert [whole(first[i]) for i in range(20)] == [whole(w) for w in backwards]
    other = windows(books, seed=1)
    assert sum(whole(first[i]) == whole(other[i]) for i in range(20)) == 0


def test_short_texts_share_a_window(folder, tokenizer):
    leaflets = read_texts([str(folder / "leaflets.jsonl")] * 3, tokenizer)
    stream = TokenStream(leaflets, ["input_ids"])
    assert stream.num_tokens == 60
    together = sum((list(row) for row in leaflets["input_ids"]), [])
    for window in windows(leaflets):
        tokens = whole(window)
        assert tokens in [
            together[i : i + len(tokens)] for i in range(61 - len(tokens))
        ]


def test_an_end_of_text_ends_each_text(folder, tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(folder / "target", eos_token=WORDS[5])
    rows = read_texts([str(folder / "leaflets.jsonl")], tokenizer)
    assert [len(row) for row in rows["input_ids"]] == [11, 11]
    assert [row[-1] for row in rows["input_ids"]] == [5, 5]


def test_a_window_of_what_the_target_wrote_ends_within_it(written):
    tokens = LONG["prompt"] + LONG["continuation"]
    ends = Counter()
    for window in windows(None, written):
        found, next_ids = whole(window), window["next_ids"].tolist()
        end = tokens.index(found[-1]) + 1
        ends[end] += 1
        assert found == tokens[end - len(found) : end]
        assert window["counted"].all()
        assert next_ids == tokens[end - CONTINUATION + 1 : end + 1]
        place = end - CONTINUATION - 49  # of the first next token in the continuation
        for name in ("top_ids", "top_logprobs"):
            expected = LONG[name][place : place + CONTINUATION]
            assert window[name].tolist() == expected
    assert set(ends) == set(range(62, 70))  # every one with as many tokens after it


def test_short_continuations_share_a_window_and_prompts_do_not_count(folder):
    both = read_continuations([str(folder / "plain.jsonl")])
    dataset = windows(None, both, prefix_tokens=[90])
    together = sum((r["prompt"] + r["continuation"] for r in PLAIN), [])
    is_written = sum(
        ([False] * 50 + [True] * len(r["continuation"]) for r in PLAIN), []
    )
    seen = set()
    for window in dataset:
        found = whole(window)
        starts = [
            start
            for start in range(len(together))
            if [together[(start + i) % 131] for i in range(102)] == found
        ]
        (start,) = starts
        places = [(start + 91 + i) % 131 for i in range(CONTINUATION)]
        assert window["counted"].tolist() == [is_written[p] for p in places]
        assert window["next_ids"].tolist() == [
            together[p] if is_written[p] else IGNORED for p in places
        ]
        assert "top_ids" not in window
        seen.add(bool(window["counted"].all()))
    assert seen == {True, False}


def test_top_logprobs_are_read_where_every_source_has_them(folder):
    with_tops = str(folder / "both.jsonl")
    assert "top_ids" in read_continuations([with_tops]).column_names
    mixed = read_continuations([with_tops, str(folder / "plain.jsonl")])
    assert set(mixed.column_names) == {"prompt", "continuation"}
    assert len(mixed) == 4


def test_each_position_has_the_temperature_that_it_was_written_at(tmp_path):
    file = tmp_path / "written.jsonl"
    given = [{**LONG, "temperature": 0.7}, {**SHORT, "temperature": 0.0}]
    file.write_text("".join(json.dumps(record) + "\n" for record in given))
    dataset = windows(None, read_continuations([str(file)]), prefix_tokens=[90])
    together = [
        temperature
        for r, temperature in zip(PLAIN, (0.7, 0.0), strict=True)
        for _ in r["prompt"] + r["continuation"]
    ]
    tokens = sum((r["prompt"] + r["continuation"] for r in PLAIN), [])
    seen = set()
    for window in dataset:
        (start,) = [
            start
            for start in range(len(tokens))
            if [tokens[(start + i) % 131] for i in range(102)] == whole(window)
        ]
        expected = [together[(start + 91 + i) % 131] for i in range(CONTINUATION)]
        assert window["temperatures"].tolist() == pytest.approx(expected)
        seen |= set(expected)
    assert seen == {0.7, 0.0}


def test_both_sources_are_drawn_but_never_within_a_step(books, written):
    dataset = windows(books, written, on_policy_fraction=0.5)
    steps = [
        {"next_ids" in dataset[3 * step + i] for i in range(3)} for step in range(20)
    ]
    assert all(len(step) == 1 for step in steps)
    assert 4 < sum(step == {True} for step in steps) < 16


def test_no_fraction_of_two_sources_is_the_other_one(books, written):
    dataset = windows(books, written, on_policy_fraction=0.0)
    assert not any("next_ids" in window for window in dataset)


def write(path: Path, rows: datasets.Dataset) -> str:
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif ".jsonl" in path.name:
        rows.to_json(path, compression="xz" if path.suffix == ".xz" else None)
    elif path.suffix == ".txt":
        path.write_text("\n".join(rows["text"]))
    else:
        rows.save_to_disk(path)
    return str(path)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.xz", "a.parquet", "a.txt", "saved_to_disk"]
)
def test_every_kind_of_file_is_read(tmp_path, name):
    rows = datasets.Dataset.from_dict({"text": ["w01 w02", "w03"]})
    texts = open_source(write(tmp_path / name, rows))["text"]
    # Plain text is one document, whose lines stay together.
    whole = ["w01 w02\nw03"] if name == "a.txt" else ["w01 w02", "w03"]
    assert texts == whole


def test_a_folder_is_all_its_files_of_one_kind(tmp_path):
    for name, text in (("a", "w01"), ("b", "w02")):
        write(
            tmp_path / f"{name}.parquet", datasets.Dataset.from_dict({"text": [text]})
        )
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "c.unfinished").write_text("of a run that was cut short")
    assert open_source(str(tmp_path))["text"] == ["w01", "w02"]


def test_what_is_not_there_or_not_known_is_named(tmp_path, folder, tokenizer, written):
    with pytest.raises(ConfigurationError, match="no_such.*names no file"):
        open_source(str(folder / "no_such*.jsonl"))
    (tmp_path / "a.doc").write_text("")
    with pytest.raises(ConfigurationError, match=r"a\.doc has no known suffix"):
        open_source(str(tmp_path / "a.doc"))
    with pytest.raises(ConfigurationError, match="no 'body'"):
        read_texts([str(folder / "books.jsonl")], tokenizer, column="body")
    with pytest.raises(ConfigurationError, match="lacks the columns"):
        read_continuations([str(folder / "books.jsonl")])


def test_fewer_tokens_than_a_window_are_an_error(folder, tokenizer, written):
    leaflets = read_texts([str(folder / "leaflets.jsonl")], tokenizer)
    with pytest.raises(ConfigurationError, match="texts have 20 tokens, .* the 42 "):
        windows(leaflets)
    with pytest.raises(ConfigurationError, match="continuations have 70 tokens"):
        windows(None, written, prefix_tokens=[90])


def test_unwrap_joins_the_lines_of_prose_and_keeps_those_of_verse(tmp_path, tokenizer):
    line = "a line of prose that a printer broke at about sixty letters"
    verse = "Tyger Tyger, burning bright,\nIn the forests of the night;"
    assert unwrap(f"{line}\n{line}\n\n{verse}") == f"{line} {line}\n\n{verse}"


CHATML = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def write_chats(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*words: str) -> dict:
    """Turns of user and assistant, by turns."""
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[index % 2], "content": each}
            for index, each in enumerate(words)
        ]
    }


def test_what_assistants_said_is_read_turn_by_turn(tokenizer, tmp_path, caplog):
    rows = [
        chat("w01 w02", "w03", "w04", "w05 w06"),
        chat("w07"),
        {"messages": [{"role": "tool", "content": "w08"}]},
        {"messages": []},
    ]
    source = write_chats(tmp_path / "chats.jsonl", rows)
    found = read_conversations([source], tokenizer, CHATML)
    said = "left out: 2 without an answer, 1 malformed (a message by 'tool')"
    assert said in caplog.text
    ids = [[row[name] for name in ("prompt", "continuation")] for row in found]
    unknown = 0  # what stands for the words of the template
    assert ids == [
        [[unknown, 1, 2, unknown], [3]],
        [[unknown, 1, 2, unknown, 3, unknown, 4, unknown], [5, 6]],
    ]


def test_only_what_assistants_said_is_counted(tokenizer, tmp_path):
    said = "w11 " * 20
    source = write_chats(tmp_path / "chats.jsonl", [chat("w01 " * 60, said)] * 2)
    conversations = read_conversations([source], tokenizer, CHATML)
    options = {"prefix_tokens": [8, 30], "conversations": conversations}
    for window in windows(None, **options):
        assert "next_ids" not in window  # which would be the target's choice
        tokens, counted = window["continuation_ids"], window["counted"]
        assert counted.any()
        # The position before each is where it is predicted.
        assert (tokens[1:][counted[:-1]] == 11).all()
        assert (window["temperatures"] == 1).all()


def test_texts_and_conversations_are_half_of_the_rest_each(
    books, written, tokenizer, tmp_path
):
    source = write_chats(tmp_path / "chats.jsonl", [chat("w01 " * 60, "w11 " * 20)])
    conversations = read_conversations([source], tokenizer, CHATML)
    options = {"conversations": conversations, "num_windows": 900}
    dataset = windows(books, written, on_policy_fraction=0.5, **options)
    kinds: Counter[str] = Counter()
    for window in (dataset[index] for index in range(0, 900, 3)):
        said = bool((window["continuation_ids"] == 11).all())
        kinds["target" if "next_ids" in window else "said" if said else "text"] += 1
    assert abs(kinds["target"] - 150) < 35
    assert abs(kinds["said"] - 75) < 30 and abs(kinds["text"] - 75) < 30
    # Without the others it is all that there is.
    alone = windows(None, written, on_policy_fraction=0.0)
    assert all("next_ids" in window for window in alone)


def test_conversations_without_an_answer_are_refused(tokenizer, tmp_path):
    source = write_chats(tmp_path / "chats.jsonl", [chat("w01"), {"messages": []}])
    with pytest.raises(
        ConfigurationError, match=r"2 rows and no answer .*without an an"
    ):
        read_conversations([source], tokenizer, CHATML)
