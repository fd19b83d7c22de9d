"""Data that nobody foresaw: one error with the file, the column, and what is wanted."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support import books
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.sources import (
    open_source,
    read_continuations,
    read_texts,
)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = books.write_target(tmp_path_factory.mktemp("target"))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("rows", "mentions"),
    [
        ([{"messages": []}], ["no 'text'", "--conversations"]),
        ([{"text": "a"}] * 3 + [{"text": None}], ["'None'", "'text' of row 3"]),
        ([{"text": 7}] * 2, ["'7'", "'text' of row 0", "text is wanted"]),
        ([{"text": ["a", "b"]}], ["['a', 'b']", "text is wanted"]),
        ([{"text": "a"}, {"text": 7}], ["'7'", "'text' of row 1", "f.jsonl"]),
    ],
)
def test_texts_of_something_else(tmp_path, tokenizer, rows, mentions):
    file = lines(tmp_path / "f.jsonl", rows)
    with pytest.raises(ConfigurationError) as refusal:
        read_texts([file], tokenizer)
    for part in mentions:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("rows", "mentions"),
    [
        (
            [{"prompt": "a", "continuation": "b"}],
            ["'a'", "row 0", "a list of token ids"],
        ),
        (
            [
                {"prompt": [1], "continuation": [2]},
                {"prompt": [1], "continuation": None},
            ],
            ["'None' in the column 'continuation' of row 1"],
        ),
        ([{"prompt": [1], "continuation": []}] * 3, ["every continuation", "is empty"]),
        ([{"prompt": [1], "continuation": [2.5]}], ["'[2.5]'", "a list of token ids"]),
        ([{"prompt": [1], "continuation": [1, None]}], ["token ids null"]),
        ([{"prompt": [100], "continuation": [1]}], ["ids 100 to 100", "0 to 99"]),
        ([{"prompt": [1], "continuation": [-1]}], ["ids -1 to -1"]),
    ],
)
def test_continuations_of_something_else(tmp_path, rows, mentions):
    file = lines(tmp_path / "f.jsonl", rows)
    with pytest.raises(ConfigurationError) as refusal:
        read_continuations([file], vocab_size=100)
    for part in (file, *mentions):
        assert part in str(refusal.value)


LIKELY = {
    "prompt": [1],
    "continuation": [2, 3],
    "temperature": 0.5,
    "top_ids": [[2, 9], [3, 9]],
    "top_logprobs": [[-0.1, -3.0], [0, -4.0]],
}
PLAIN = {"prompt": [1], "continuation": [2]}


def test_what_else_is_stored_of_continuations_is_read(tmp_path):
    file = lines(tmp_path / "f.jsonl", [LIKELY, LIKELY | {"title": "a"}])
    read = read_continuations([file], vocab_size=100)
    assert read.select_columns(sorted(LIKELY))[1] == LIKELY


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"top_ids": None}, ["'None' in the column 'top_ids' of row 1", "2 numbers"]),
        ({"top_ids": [[2, 9]]}, ["'top_ids' of row 1", "each token"]),
        ({"top_ids": [[2, 9], [3]]}, ["'[[2, 9], [3]]'", "'top_ids' of row 1"]),
        ({"top_ids": [[2, 9], None]}, ["'top_ids' of row 1"]),
        ({"top_ids": [[2, 9], [3, None]]}, ["'top_ids' of row 1"]),
        ({"top_ids": 7}, ["'top_ids' of row"]),
        (
            {"top_ids": [[2, 9], [3, 100]]},
            ["ids 2 to 100 in the column 'top_ids"],
        ),
        ({"top_ids": [[2, -9], [3, 9]]}, ["token ids -9 to 9 in the column 'top_ids"]),
        ({"top_logprobs": [[[-1.0]], [[-1.0]]]}, ["'top_logprobs' of row"]),
        ({"top_logprobs": [[-1.0], [-2.0]]}, ["'top_logprobs' of row 1"]),
        ({"temperature": None}, ["'None' in the column 'temperature' of row 1"]),
        ({"temperature": -0.5}, ["'-0.5' in the column 'temperature' of row 1"]),
        ({"temperature": "0"}, ["read as", "in the column 'temperature'"]),
    ],
)
def test_what_else_is_stored_is_right_in_every_row(tmp_path, changes, mentions):
    file = lines(tmp_path / "f.jsonl", [LIKELY, LIKELY | changes, LIKELY])
    with pytest.raises(ConfigurationError) as refusal:
        read_continuations([file], vocab_size=100)
    for part in (file, *mentions):
        assert part in str(refusal.value)


def test_every_source_has_as_many_of_the_likeliest(tmp_path):
    one = {"top_ids": [[2], [3]], "top_logprobs": [[-0.1], [-0.2]]}
    files = [
        lines(tmp_path / "two.jsonl", [LIKELY]),
        lines(tmp_path / "one.jsonl", [LIKELY | one]),
    ]
    with pytest.raises(ConfigurationError, match="one.jsonl.*row 0, where 2 numbers"):
        read_continuations(files, vocab_size=100)
    files[1] = lines(tmp_path / "plain.jsonl", [PLAIN])
    assert "top_ids" not in read_continuations(files, vocab_size=100).column_names


def test_continuations_without_prompts_are_read(tmp_path):
    file = lines(tmp_path / "f.jsonl", [{"prompt": [], "continuation": [1, 99]}] * 2)
    assert len(read_continuations([file], vocab_size=100)) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.jsonl", b""),
        ("f.jsonl", b'{"text": "a"}\n{"text": '),
        ("f.jsonl", b"not json at all"),
        ("f.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n'),
        ("f.jsonl", b'{"turns": [{"from": "\xe8\x7f", "value": "b"}]}\n'),
        ("f.txt", "caf\u00e9".encode("latin-1")),
        ("f.parquet", b"PAR1 no more"),
        ("f.jsonl.xz", b"not packed"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as refusal:
        open_source(str(file))
    assert str(file) in str(refusal.value)
    assert "UTF-8" in str(refusal.value)


def test_the_one_file_of_several_that_cannot_be_read_is_named(tmp_path):
    for name in "abc":
        lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "b.jsonl").write_bytes(b"{")
    with pytest.raises(ConfigurationError, match=r"b\.jsonl' cannot be read"):
        open_source(str(tmp_path))


def test_a_table_of_no_rows(tmp_path):
    datasets.Dataset.from_dict({"text": []}).to_parquet(str(tmp_path / "f.parquet"))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        open_source(str(tmp_path / "f.parquet"))
