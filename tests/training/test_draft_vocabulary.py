"""Runs that train a drafter of a part of the vocabulary, and what they leave."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from tests.support import models
from tests.support.drafting import Requests, build_proposer
from tests.support.training_runs import history, losses, train, write_inputs
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.drafter.draft_vocabulary import (
    FILE,
    read_token_ids,
    write_draft_vocabulary,
)
from vllm_budgetdraft.drafter.modeling import Drafter, initialise
from vllm_budgetdraft.training.arguments import ObjectiveArguments, ViewArguments
from vllm_budgetdraft.training.inputs import Inputs
from vllm_budgetdraft.training.model import MultiViewModel
from vllm_budgetdraft.training.objectives import OBJECTIVES

SIZE = 40
#: The likeliest first.
IDS = torch.randperm(models.VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
IDS = IDS[:SIZE]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of 4 steps with as many tokens as ``SIZE``."""
    output = tmp_path_factory.mktemp("trained")
    train(inputs, output, "--draft_vocabulary", str(SIZE), steps=4)
    return output


def ids_of(folder: Path) -> list[int]:
    return read_token_ids(folder / FILE, models.VOCAB_SIZE).tolist()


def drafts_of(folder: Path) -> set[int]:
    """What is drafted after some contexts, greedily and drawn."""
    found: set[int] = set()
    for settings, temperatures in (
        ({}, None),
        ({"draft_sample_method": "probabilistic"}, [1.0]),
    ):
        proposer = build_proposer(folder, vocab_size=models.VOCAB_SIZE, **settings)
        requests = Requests(proposer)
        for seed in range(8):
            requests.start(0, 20, seed)
            drafts = requests.drafts([0], None, temperatures)
            found |= set(drafts.tokens.flatten().tolist())
            requests.release(0)
    return found


def likeliest(inputs: Path) -> torch.Tensor:
    """All tokens, in the order of the data."""
    rows = (inputs / "books.jsonl").read_text().splitlines()
    words = " ".join(json.loads(row)["text"] for row in rows).split()
    counts = [words.count(f"w{token:02}") for token in range(models.VOCAB_SIZE)]
    ordered = sorted(range(models.VOCAB_SIZE), key=lambda token: -counts[token])
    return torch.tensor(ordered)


@pytest.mark.parametrize("part", ["", "checkpoint-2", "checkpoint-4"])
def test_every_folder_names_the_likeliest_tokens_of_the_data(trained, inputs, part):
    assert ids_of(trained / part) == likeliest(inputs)[:SIZE].tolist()


def test_the_folder_drafts_these_tokens_and_is_a_plain_model(trained):
    found = drafts_of(trained)
    assert len(found) > 3 and found <= set(ids_of(trained))
    model = models.read_model(trained)
    assert model(models.random_tokens(20)[None]).logits.shape[-1] == models.VOCAB_SIZE
    assert len(load_drafter(trained, max_positions=8).head) == models.VOCAB_SIZE


def test_the_log_and_the_card_say_how_much_of_the_target_it_has(trained):
    entries = [e for e in history(trained / "checkpoint-4") if "loss" in e]
    for entry in entries:
        assert 0 < entry["label_coverage"] < 1 and 0 < entry["coverage"] < 1
    card = (trained / "README.md").read_text()
    assert "drafts 40 of the 97 tokens" in card
    labels, mass = (
        sum(entry[name] for entry in entries) / len(entries)
        for name in ("label_coverage", "coverage")
    )
    assert f"were {labels:.1%} of the tokens that the target" in card
    assert f"and {mass:.1%} of its probability" in card


@pytest.mark.parametrize("asked", [("--draft_vocabulary", str(SIZE)), ()])
def test_a_resumed_run_has_the_vocabulary_of_its_checkpoint(
    trained, inputs, tmp_path, asked
):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    train(inputs, tmp_path, "--resume_from_checkpoint", "true", *asked, steps=4)
    assert losses(tmp_path / "checkpoint-4") == losses(trained / "checkpoint-4")
    expected, found = (load_file(x / "model.safetensors") for x in (trained, tmp_path))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert ids_of(tmp_path) == ids_of(trained)


def test_what_goes_on_from_a_drafter_has_its_vocabulary_unless_told(
    trained, inputs, tmp_path
):
    goes_on = ("--drafter", str(trained))
    train(inputs, tmp_path, *goes_on, steps=1)
    assert ids_of(tmp_path) == ids_of(tmp_path / "checkpoint-1") == ids_of(trained)
    train(inputs, tmp_path, *goes_on, "--draft_vocabulary", "20", steps=1)
    assert ids_of(tmp_path) == ids_of(trained)[:20]
    # And nothing of that is left where all tokens are learnt.
    train(inputs, tmp_path, *goes_on, "--draft_vocabulary", "0", steps=1)
    assert not list(tmp_path.rglob(FILE))
    assert "label_coverage" not in history(tmp_path / "checkpoint-1")[0]
    assert "tokens of the vocabulary" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["ids", "d2t"])
def test_a_file_is_taken_as_it_is(inputs, tmp_path, kind):
    """In its order; or as EAGLE-3 heads have theirs, in that of the data."""
    write_draft_vocabulary(tmp_path, IDS)
    ids, file = IDS, tmp_path / FILE
    if kind == "d2t":
        ids, file = IDS.sort().values, tmp_path / "head.safetensors"
        save_file({"d2t": ids - torch.arange(SIZE)}, file)
    measures = f"""
        --draft_vocabulary {file} --objective lk_hybrid --position_weights dpace
        --eval_strategy steps --eval_steps 2 --eval_texts {inputs / "books.jsonl"}
        --eval_contexts 40 --eval_budgets 24 --eval_temperatures 0 1
        --eval_prompts 2 --eval_new_tokens 12 --eval_draft_tokens 3
    """.split()
    output = tmp_path / "out"
    train(inputs, output, *measures, steps=2)
    if kind == "d2t":
        ids = likeliest(inputs)
        ids = ids[torch.isin(ids, IDS)]
    assert ids_of(output) == ids_of(output / "checkpoint-2") == ids.tolist()
    assert drafts_of(output) <= set(ids.tolist())
    assert any("eval_acceptance_length" in e for e in history(output / "checkpoint-2"))


def test_layers_alone_have_the_file_and_so_does_what_is_joined(inputs, tmp_path):
    layers, joined = tmp_path / "layers", tmp_path / "joined"
    more = ("--layers_alone", "true", "--draft_vocabulary", str(SIZE))
    train(inputs, layers, *more, "--objective", "ce", steps=1)
    assert "coverage" not in history(layers / "checkpoint-1")[0]
    command = f"join --target {inputs / 'target'} --layers {layers} --output {joined}"
    main(command.split())
    assert ids_of(joined) == ids_of(layers)
    assert drafts_of(joined) <= set(ids_of(layers))
    (layers / FILE).unlink()
    main(command.split())
    assert not (joined / FILE).exists(), "it is of the drafter that was there"


@pytest.mark.parametrize("objective", ["ce", *OBJECTIVES])
@pytest.mark.parametrize("is_stored", [False, True])
def test_rows_of_other_tokens_learn_nothing(objective, is_stored):
    config = models.llama(num_hidden_layers=1, tie_word_embeddings=False)
    tokens = models.random_tokens(2 * 48).view(2, 48)
    prefix, continuation = tokens.split((40, 8), 1)
    target = models.random_model(config, seed=1)
    stored = {}
    if is_stored:
        log_p = target(tokens).logits[:, 40:].log_softmax(-1)
        top_logprobs, top_ids = log_p.topk(9)
        stored = {"next_ids": top_ids[..., 0], "top_ids": top_ids}
        stored["top_logprobs"] = top_logprobs
    drafter = Drafter(config, max_positions=64)
    initialise(drafter)
    model = MultiViewModel(
        drafter,
        target,
        ViewArguments(budgets=[24], budget_weights=[1.0]),
        ObjectiveArguments(objective, draft_tokens=8),
        ViewSettings(),
        draft_ids=IDS,
    )
    counted = torch.ones_like(continuation).bool()
    windows = torch.tensor([0, 1])
    found = model(windows, prefix, continuation, counted, **stored)
    found["loss"].backward()
    others = torch.ones(models.VOCAB_SIZE).bool()
    others[IDS] = False
    gradient = drafter.lm_head.grad
    assert gradient.shape == (models.VOCAB_SIZE, config.hidden_size)
    assert not gradient[others].any() and gradient[IDS].any()
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict())
    assert 0 < model.metrics["label_coverage"] < 1


def test_what_the_target_wrote_is_counted_where_there_is_some():
    written, said = (
        Dataset.from_dict({"prompt": [[1]], "continuation": [[token]]})
        for token in (2, 3)
    )
    texts = Dataset.from_dict({"input_ids": [[4, 5]]})
    assert Inputs(texts, written, said).learnt == [(written, "continuation")]
    assert Inputs(texts, None, said).learnt == [
        (texts, "input_ids"),
        (said, "continuation"),
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["98"], "a draft vocabulary of 98 tokens: there are 97"),
        (["-3"], "a draft vocabulary of -3 tokens"),
        (["16k"], "draft_vocabulary='16k' is no file, and no number of tokens; give"),
        (
            ["20", "--drafter_type", "flexdraft", "--draft_tokens", "4"],
            "draft_vocabulary='20': a flexdraft drafts by its target's own",
        ),
    ],
    ids=["too_many", "negative", "no_file", "flexdraft"],
)
def test_what_is_no_vocabulary_is_refused(inputs, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        train(inputs, tmp_path / "run", "--draft_vocabulary", *more, steps=1)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_vocabulary_of_another_target_is_refused(inputs, tmp_path, capsys):
    write_draft_vocabulary(tmp_path, torch.tensor([3, models.VOCAB_SIZE]))
    with pytest.raises(SystemExit):
        train(
            *(inputs, tmp_path / "run", "--draft_vocabulary", str(tmp_path / FILE)),
            steps=1,
        )
    assert "has the token ids 3 to 97" in capsys.readouterr().err
