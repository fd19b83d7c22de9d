import json
from itertools import islice

import pytest
import torch
from torch.utils.data import default_collate
from transformers import AutoTokenizer

from tests.support.books import WORDS, write_books, write_target
from vllm_budgetdraft.training.data import TokenWindows, unwrap
from vllm_budgetdraft.training.losses import IGNORED

CONTINUATION = 12
#: A prompt of 50, and 20 or 11 tokens that the target wrote.
LONG = {"prompt": list(range(50)), "continuation": list(range(60, 80))}
SHORT = {"prompt": list(range(50)), "continuation": list(range(11))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_target(folder / "target")
    write_books(folder / "books.jsonl")
    write_books(folder / "leaflets.jsonl", num_words=10)
    lines = "".join(json.dumps(record) + "\n" for record in (LONG, SHORT))
    (folder / "continuations.jsonl").write_text(lines)
    return folder


def windows(folder, books="books.jsonl", **changes) -> TokenWindows:
    arguments = {
        "books": str(folder / books),
        "continuations": None,
        "tokenizer": AutoTokenizer.from_pretrained(folder / "target"),
        "prefix_tokens": [8, 30],
        "continuation_tokens": CONTINUATION,
        "on_policy_fraction": 1.0,
        "batch_size": 3,
        "seed": 0,
    }
    return TokenWindows(**{**arguments, **changes})


def batches(dataset: TokenWindows, count: int) -> list[dict]:
    examples = iter(dataset)
    return [default_collate(list(islice(examples, 3))) for _ in range(count)]


def test_a_batch_shares_a_prefix_length_and_every_length_is_drawn(folder):
    drawn = set()
    for batch in batches(windows(folder), 20):
        drawn.add(batch["prefix_ids"].shape[1])
        assert len(batch["prefix_ids"]) == 3
        assert batch["continuation_ids"].shape == (3, CONTINUATION)
    assert drawn == {8, 30}


def test_passages_are_pieces_of_the_books(folder):
    lines = (folder / "books.jsonl").read_text().splitlines()
    books = [json.loads(line)["text"] for line in lines]
    for batch in batches(windows(folder), 5):
        assert "labels" not in batch
        for row in torch.cat([batch["prefix_ids"], batch["continuation_ids"]], 1):
            # The first word may be cut, and is then another token.
            passage = " ".join(WORDS[token] for token in row[1:])
            assert any(passage in book for book in books)


def test_a_seed_gives_the_same_windows_again(folder):
    first, again = (batches(windows(folder), 5) for _ in range(2))
    other = batches(windows(folder, seed=1), 5)
    assert str(first) == str(again) != str(other)


def test_labels_of_a_continuation_are_the_tokens_that_the_target_wrote_next(folder):
    stored = str(folder / "continuations.jsonl")
    # SHORT has too few tokens of the target's own.
    whole = LONG["prompt"] + LONG["continuation"]
    for batch in batches(windows(folder, continuations=stored), 5):
        prefix = batch["prefix_ids"].shape[1]
        window = whole[-prefix - CONTINUATION :]
        assert batch["prefix_ids"].tolist() == 3 * [window[:prefix]]
        assert batch["continuation_ids"].tolist() == 3 * [window[prefix:]]
        assert batch["labels"].tolist() == 3 * [[*window[prefix + 1 :], IGNORED]]


def test_both_sources_are_drawn_but_never_within_a_batch(folder):
    stored = str(folder / "continuations.jsonl")
    dataset = windows(folder, continuations=stored, on_policy_fraction=0.5)
    with_labels = ["labels" in batch for batch in batches(dataset, 20)]
    assert 4 < sum(with_labels) < 16


def test_books_shorter_than_a_window_are_an_error_and_not_an_endless_search(folder):
    dataset = windows(folder, books="leaflets.jsonl", prefix_tokens=[30])
    with pytest.raises(ValueError, match="no passage of 42 tokens .* longer books"):
        next(iter(dataset))


def test_a_glob_without_files_is_named(folder):
    with pytest.raises(FileNotFoundError, match="no_such"):
        windows(folder, books="no_such*.jsonl")


def test_unwrap_joins_the_lines_of_prose_and_keeps_those_of_verse():
    line = "a line of prose that a printer broke at about sixty letters"
    verse = "Tyger Tyger, burning bright,\nIn the forests of the night;"
    assert unwrap(f"{line}\n{line}\n\n{verse}") == f"{line} {line}\n\n{verse}"
