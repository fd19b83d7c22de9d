"""``budgetdraft vocabulary``: what is counted, kept and written."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from tests.support import books, models
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.drafter.draft_vocabulary import FILE, read_draft_vocabulary
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.make_vocabulary import coverages
from vllm_budgetdraft.training.vocabulary_counts import (
    count_tokens,
    kept_tokens,
    likeliest_tokens,
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return books.write_target(tmp_path / "target")


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "drafter", models.llama())


def write_continuations(path: Path, continuations: list[list[int]]) -> str:
    rows = [{"prompt": [90], "continuation": each} for each in continuations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_tokens_are_counted_in_every_row():
    rows = Dataset.from_dict({"ids": [[3, 1, 3], [], [0, 3]]}).select([2, 0, 1])
    assert count_tokens(rows, "ids", 5).tolist() == [1, 1, 0, 3, 0]
    assert count_tokens(rows.select([1]), "ids", 5).tolist() == [0, 1, 0, 2, 0]


def test_nothing_is_counted_where_there_is_nothing():
    empty = Dataset.from_dict({"ids": [[], []]})
    assert count_tokens(empty, "ids", 3).tolist() == [0, 0, 0]


def test_counting_leaves_no_copies_in_the_cache(tmp_path):
    """Of what else the rows hold, which may be far more."""
    rows = {"ids": [[1, 2]] * 50, "other": [[0.5] * 100] * 50}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    part = load_from_disk(tmp_path / "rows").select(range(0, 50, 10))
    before = set((tmp_path / "rows").iterdir())
    assert count_tokens(part, "ids", 3).tolist() == [0, 5, 5]
    assert set((tmp_path / "rows").iterdir()) == before


def test_ids_beyond_the_vocabulary_are_refused():
    rows = Dataset.from_dict({"ids": [[3, 5]]})
    with pytest.raises(ConfigurationError, match="token id 5 occurs in 'ids', and the"):
        count_tokens(rows, "ids", 5)


def test_a_tokenizer_that_is_not_hugging_faces_has_control_tokens_too():
    class Other:
        all_special_ids = [2]

        def added_tokens_decoder(self):
            raise AssertionError("it is no property there")

        def get_vocab(self):
            return {"a": 0, "b": 1, "</s>": 2, " 17": 3}

        def batch_decode(self, tokens):
            return [["a", "b", "</s>", " 17"][token] for (token,) in tokens]

    assert kept_tokens(Other()) == [2, 3]


def test_the_likeliest_come_first_and_then_by_their_ids():
    counts = torch.tensor([0, 5, 0, 9, 5, 0])
    assert likeliest_tokens(counts, []).tolist() == [3, 1, 4, 0, 2, 5]
    assert likeliest_tokens(counts, [5, 0], 4).tolist() == [0, 5, 3, 1]
    assert counts.tolist() == [0, 5, 0, 9, 5, 0]


@pytest.mark.parametrize("size", [0, 2, 7])
def test_sizes_that_hold_too_little_or_more_than_there_is(size):
    with pytest.raises(ConfigurationError) as caught:
        likeliest_tokens(torch.zeros(6, dtype=torch.int64), [0, 5], size)
    assert f"a draft vocabulary of {size} tokens: there are 6, and 2 control" in str(
        caught.value
    )


def test_control_tokens_and_numbers_are_kept(target):
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert kept_tokens(tokenizer) == []
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.add_tokens(["7", "42", "x9", "٣"])
    kept = tokenizer.convert_ids_to_tokens(kept_tokens(tokenizer))
    assert kept == ["<end>", "7", "42"]


def test_coverage_by_hand():
    ordered = torch.arange(3000).flip(0)
    counts = torch.zeros(3000, dtype=torch.int64)
    counts[[2999, 2999 - 1023, 2999 - 1024, 0]] = torch.tensor([4, 3, 2, 1])
    found = coverages(ordered, counts, 1025)
    assert [size for size, _ in found] == [1024, 1025, 2048, 3000]
    shares = torch.tensor([share for _, share in found])
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.9, 0.9, 1.0]))


def test_the_command_writes_what_the_target_writes_most(
    target, drafter, tmp_path, capsys
):
    continuations = [[5, 6, 7], [5, 6], [5]] * 10
    file = write_continuations(tmp_path / "c.jsonl", continuations)
    options = ["--target", str(target), "--continuations", file, "--size", "2"]
    main(["vocabulary", str(drafter), *options])
    config = read_drafter_config(drafter)
    assert read_draft_vocabulary(drafter, config).tolist() == [5, 6]
    assert read_draft_vocabulary(drafter, config, 1).tolist() == [5]
    said = capsys.readouterr().out
    assert "60 tokens in 30 rows, of which 3 of 97 are different; 0 control" in said
    # Of the rows 0, 10 and 20: one of each kind.
    assert "2   83.33%  written" in said
    assert "97  100.00%" in said
    assert f"Written to {drafter / FILE}." in said


def test_texts_and_conversations_are_counted(target, drafter, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "w04 w09 w09"}) + "\n")
    options = ["--target", str(target), "--size", "1"]
    main(["vocabulary", str(drafter), *options, "--texts", str(texts)])
    assert read_draft_vocabulary(drafter, read_drafter_config(drafter)).tolist() == [9]
    assert "of the counted text itself" in capsys.readouterr().out
    chats = tmp_path / "chats.jsonl"
    messages = [
        {"role": "user", "content": "w09 w09 w09"},
        {"role": "assistant", "content": "w04 w04"},
    ]
    chats.write_text(json.dumps({"messages": messages}) + "\n")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    options += ["--chat-template", template]
    main(["vocabulary", str(drafter), *options, "--conversations", str(chats)])
    assert read_draft_vocabulary(drafter, read_drafter_config(drafter)).tolist() == [4]


def test_another_vocabulary_is_refused(target, tmp_path, capsys):
    drafter = models.write_model(tmp_path / "other", models.llama(vocab_size=50))
    file = write_continuations(tmp_path / "c.jsonl", [[1]])
    with pytest.raises(SystemExit):
        main(
            ["vocabulary", str(drafter), "--target", str(target)]
            + ["--continuations", file]
        )
    assert "vocab_size=50 differs from the target's 97" in capsys.readouterr().err
    assert not (drafter / FILE).exists()
