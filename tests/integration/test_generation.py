"""``budgetdraft generate``: what the target writes, in files that training reads."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from tests.support import models
from tests.support.books import WORDS, write_books, write_target
from tests.support.processes import run_in_process
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.training.sources import read_continuations
from vllm_budgetdraft.training.windows import TokenWindows

pytestmark = pytest.mark.vllm

ENGINE = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_target(folder / "target", head_dim=32)  # vLLM takes no smaller one
    write_books(folder / "books.jsonl")
    return folder


def arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        "generate",
        *("--target", str(inputs / "target")),
        *("--texts", str(inputs / "books.jsonl")),
        *("--output", str(output)),
        *("--prompts", "12:3", "30:4"),
        *("--new-tokens", "9", "--top-logprobs", "3", "--prompts-per-file", "3"),
        *("--max-num-seqs", "4", "--engine-args", json.dumps(ENGINE)),
        *more,
    ]


def generate(inputs: Path, output: Path, *more: str) -> str:
    return run(*arguments(inputs, output, *more))


def run(*command_line: str) -> str:
    """In a process of its own, what is printed."""
    return run_in_process(printed_by, command_line)


def printed_by(command_line: tuple[str, ...]) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        main(list(command_line))
    return printed.getvalue()


def rows(folder: Path) -> list[dict]:
    return list(read_continuations([str(folder)]))


@pytest.fixture(scope="module")
def greedy(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("greedy")
    generate(inputs, folder)
    return folder


def test_the_target_goes_on_greedily_and_its_likeliest_tokens_are_stored(
    inputs, greedy
):
    target = models.read_model(inputs / "target")
    found = rows(greedy)
    assert sorted(len(row["prompt"]) for row in found) == [12, 12, 12, 30, 30, 30, 30]
    end = target.config.eos_token_id
    for row in found:
        *others, last = row["continuation"]
        assert end not in others and (last == end or len(others) == 8)
        context = torch.tensor([row["prompt"] + row["continuation"]])
        log_p = target(context).logits[0].log_softmax(-1)[len(row["prompt"]) - 1 : -1]
        assert log_p.argmax(-1).tolist() == row["continuation"]
        ids = torch.tensor(row["top_ids"])
        assert torch.equal(ids, log_p.topk(3).indices)
        stored = torch.tensor(row["top_logprobs"])
        torch.testing.assert_close(stored, log_p.gather(-1, ids), rtol=0, atol=1e-3)


def test_every_row_says_at_which_temperature_it_was_written(greedy):
    assert {row["temperature"] for row in rows(greedy)} == {0.0}


def test_training_reads_them(greedy):
    windows = TokenWindows(
        None,
        read_continuations([str(greedy)]),
        prefix_tokens=[8],
        continuation_tokens=6,
        on_policy_fraction=1.0,
        windows_per_step=2,
        num_windows=10,
        seed=0,
    )
    for window in windows:
        assert torch.equal(window["top_ids"][:, 0], window["next_ids"])


def test_a_run_that_was_cut_short_goes_on(inputs, greedy):
    before = {path.name: path.read_bytes() for path in greedy.glob("part-*.parquet")}
    assert sorted(before) == [f"part-0000{i}.parquet" for i in range(3)]
    expected = rows(greedy)
    (greedy / "part-00001.parquet").unlink()
    (greedy / "part-00001.unfinished").write_text("half of it")
    assert "2 of 3 files are there already" in generate(inputs, greedy)
    assert rows(greedy) == expected
    assert (greedy / "part-00000.parquet").read_bytes() == before["part-00000.parquet"]
    assert not (greedy / "part-00001.unfinished").exists()


def test_the_target_is_asked_about_the_texts_themselves(inputs, tmp_path):
    generate(inputs, tmp_path, "--teacher-forced")
    target = models.read_model(inputs / "target")
    texts = [json.loads(line)["text"] for line in open(inputs / "books.jsonl")]
    for row in rows(tmp_path):
        tokens = row["prompt"] + row["continuation"]
        assert len(row["continuation"]) == 9 and len(row["prompt"]) in (12, 30)
        assert " ".join(WORDS[token] for token in tokens) in " ".join(texts)
        log_p = target(torch.tensor([tokens])).logits[0].log_softmax(-1)[-10:-1]
        ids = torch.tensor(row["top_ids"])
        assert torch.equal(ids, log_p.topk(3).indices)
        stored = torch.tensor(row["top_logprobs"])
        torch.testing.assert_close(stored, log_p.gather(-1, ids), rtol=0, atol=1e-3)


def test_samples_differ_by_prompt_and_not_by_run(inputs, tmp_path):
    sampled = ("--temperature", "1.5", "--prompts", "12:4")
    for name in ("first", "second"):
        generate(inputs, tmp_path / name, *sampled)
    first, second = (rows(tmp_path / name) for name in ("first", "second"))
    assert first == second
    assert any(row["continuation"] != [t[0] for t in row["top_ids"]] for row in first)


def test_conversations_are_answered_turn_by_turn(inputs, tmp_path):
    file = tmp_path / "chats.jsonl"
    turns = [["w05 w06", "w07"], ["w11"], ["w12 w13", "w14", "w15"]]
    file.write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    texts = arguments(inputs, tmp_path / "out")
    at = texts.index("--texts")
    texts[at : at + 2] = ["--conversations", str(file), "--chat-template", template]
    run(*texts, "--temperature", "0", "1", "--max-model-len", "64")
    found = rows(tmp_path / "out")
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    (of_file,) = counts.values()
    end = models.read_model(inputs / "target").config.eos_token_id
    cut = sum(row["continuation"][-1] != end for row in found)
    assert of_file == {"complete": 2 * len(turns), "answers": len(found), "cut": cut}
    assert len(found) == 2 * sum(map(len, turns))
    target = models.read_model(inputs / "target")
    for row in found:
        context = torch.tensor([row["prompt"] + row["continuation"]])
        log_p = target(context).logits[0].log_softmax(-1)[len(row["prompt"]) - 1 : -1]
        likeliest = log_p.argmax(-1).tolist()
        assert row["temperature"] or likeliest == row["continuation"]
        stored = torch.tensor(row["top_logprobs"])
        ids = torch.tensor(row["top_ids"])
        torch.testing.assert_close(stored, log_p.gather(-1, ids), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "0.5"], "was begun with temperature=[0.0], not [0.5]"),
        (["--prompts", "12"], "not TOKENS:COUNT"),
        (["--teacher-forced", "--top-logprobs", "0"], "stores nothing"),
    ],
)
def test_what_cannot_go_on_is_refused(inputs, tmp_path, capsys, more, message):
    output = tmp_path / "output"
    output.mkdir()
    begun = vars_of(inputs, output)
    (output / "generation.json").write_text(json.dumps(begun))
    if "--prompts" in more:
        output = tmp_path / "fresh"
    with pytest.raises(SystemExit) as stop:
        main(arguments(inputs, output, *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def vars_of(inputs: Path, output: Path) -> dict:
    """The settings of a run."""
    from argparse import ArgumentParser

    from vllm_budgetdraft import generation

    parser = ArgumentParser()
    generation.add_arguments(parser)
    args = vars(parser.parse_args(arguments(inputs, output)[1:]))
    return {k: v for k, v in args.items() if k not in generation.OF_THE_MACHINE}
