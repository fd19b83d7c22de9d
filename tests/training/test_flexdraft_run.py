"""FlexDraft from the command line to a folder that drafts."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import models
from tests.support.books import write_books, write_target
from tests.support.flex_twin import random_drafter, random_target, twin_logits
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.flexdraft.checkpoint import load_flexdraft
from vllm_budgetdraft.training.__main__ import main
from vllm_budgetdraft.training.arguments import (
    FlexDraftArguments,
    ObjectiveArguments,
    ViewArguments,
)
from vllm_budgetdraft.training.flexdraft import FlexDraftModel


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_target(folder / "target")
    write_books(folder / "books.jsonl")
    return folder


def train(inputs: Path, output: Path, *more: str, steps: int = 4) -> None:
    arguments = f"""
        --target {inputs / "target"} --texts {inputs / "books.jsonl"}
        --drafter_type flexdraft --calibration_rank 8 --draft_tokens 4
        --anchors_per_window 6 --selection_page_size 4
        --prefix_tokens 40 --continuation_tokens 24
        --budgets 16 20 --budget_weights 0.5 0.5 --local_tokens 4 --sink_tokens 3
        --per_device_train_batch_size 4 --learning_rate 0.02 --max_steps {steps}
        --lr_scheduler_type constant --logging_steps 1 --save_steps 2
        --report_to none --disable_tqdm true --use_cpu --output_dir {output}
    """
    main([*arguments.split(), *more])


#: What differs from FlexDraft as it was published.
OURS = ("--sees_bonus", "true", "--chains", "true")


def history(checkpoint: Path) -> list[dict]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["log_history"]


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    evaluation = f"""
        --eval_strategy steps --eval_steps 2 --eval_texts {inputs / "books.jsonl"}
        --eval_contexts 40 --eval_budgets 16 --eval_prompts 1 --eval_new_tokens 8
        --eval_draft_tokens 4
    """
    train(inputs, output, *OURS, *evaluation.split())
    return output


def test_a_run_lowers_the_loss_and_writes_a_small_folder(inputs, trained):
    entries = history(trained / "checkpoint-4")
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    metrics = {key for entry in entries for key in entry}
    assert {"acceptances_full", "eval_acceptance_length"} <= metrics
    assert metrics & {"acceptances_budget_16", "acceptances_budget_20"}
    target = models.read_model(inputs / "target")
    drafter = load_flexdraft(trained, target, max_positions=64)
    assert drafter.calibration_out.abs().max() > 0, "calibration learnt nothing"
    config = json.loads((trained / "config.json").read_text())
    assert drafter.sees_bonus and drafter.chains
    assert config["target"] == "target" and config["draft_tokens"] == 4
    assert config["budgetdraft"]["budgets"] == [16, 20]
    assert "FlexDraft of" in (trained / "README.md").read_text()
    assert not (trained / "tokenizer.json").exists()


def test_it_goes_on_where_it_was_stopped(inputs, trained, tmp_path):
    train(inputs, tmp_path, *OURS, steps=2)
    train(inputs, tmp_path, *OURS, "--resume_from_checkpoint", "true", steps=4)
    whole, parts = (
        load_file(folder / "checkpoint-4" / "model.safetensors")
        for folder in (trained, tmp_path)
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=name)


def test_it_goes_on_from_a_folder(inputs, trained, tmp_path):
    train(inputs, tmp_path, "--drafter", str(trained), steps=1)
    first = history(trained / "checkpoint-4")[0]["loss"]
    train(inputs, tmp_path / "again", "--drafter", str(trained), steps=2)
    assert history(tmp_path / "again" / "checkpoint-2")[0]["loss"] < first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--position_mode", "cache_relative"], "reads the target's own cache"),
        (["--draft_tokens", "24"], "do not fit in continuation_tokens=24"),
        (["--teacher_cache", "states"], "needs the target's keys"),
        (["--mask_layers", "9"], "mask_layers=9, but the target has"),
        (["--blind_fraction", "0.5"], "or set sees_bonus"),
        (["--sees_bonus", "true", "--blind_fraction", "1.5"], "share, from 0 to 1"),
        (["--eviction_policy", "heavy_hitter"], "by keys alone"),
    ],
)
def test_what_cannot_be_is_said(more, message, inputs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(inputs, tmp_path, *more)
    assert message in capsys.readouterr().err


def model(
    chains: bool = False, blind_fraction: float | None = None, **views: object
) -> FlexDraftModel:
    """
    Args:
        blind_fraction: of a drafter that sees the bonus token; None for one that does
            not.
    """
    target = random_target()
    sees_bonus = blind_fraction is not None
    return FlexDraftModel(
        random_drafter(target, chains=chains, sees_bonus=sees_bonus).requires_grad_(),
        target,
        ViewArguments(**{"budgets": [16], "budget_weights": [1.0], **views}),
        ObjectiveArguments(draft_tokens=4),
        ViewSettings(sink_tokens=3, local_tokens=4),
        FlexDraftArguments(
            anchors_per_window=5,
            selection_page_size=4,
            blind_fraction=blind_fraction or 0.0,
        ),
        {},
    )


def batch() -> dict[str, torch.Tensor]:
    prefix, continuation = models.random_tokens(2 * 50).view(2, 50).split([30, 20], 1)
    return {
        "window": torch.arange(2),
        "prefix_ids": prefix,
        "continuation_ids": continuation,
        "counted": torch.ones(2, 20, dtype=torch.bool),
        "temperatures": torch.ones(2, 20),
    }


@pytest.mark.parametrize(
    ("chains", "blind_fraction"),
    [(False, None), (True, None), (True, 0.0), (True, 1.0)],
)
def test_drafts_are_compared_as_they_would_be_made(chains, blind_fraction, monkeypatch):
    """Of two anchors, against the definition and the target's own logits."""
    training = model(sparse_weight=0.0, chains=chains, blind_fraction=blind_fraction)
    target, drafter = training._target[0], training.drafter
    compared = {}

    def loss(found, head, teacher, counted, names):
        compared["q"] = found @ head.T
        compared["p"] = teacher._head(teacher._hidden)
        return found.sum()

    monkeypatch.setattr(training, "_loss", loss)
    monkeypatch.setattr(random, "sample", lambda *_: [11, 2])
    window = batch()
    training(**window)
    tokens = torch.cat([window["prefix_ids"], window["continuation_ids"]], 1)
    p = compared["p"].view(2, 2, 4, -1)
    for row, ids in enumerate(tokens):
        logits = target(ids[None]).logits[0]
        for index, anchor in enumerate((32, 41)):
            context, following = ids[:anchor].tolist(), ids[anchor:].tolist()
            q = twin_logits(
                target,
                drafter,
                context,
                following[0],
                4,
                forced=following,
                is_told=not blind_fraction,
            )
            torch.testing.assert_close(
                compared["q"][0, row, index], q, rtol=1e-3, atol=1e-4
            )
            torch.testing.assert_close(
                p[row, index], logits[anchor : anchor + 4], rtol=1e-3, atol=1e-4
            )


def test_the_target_stays_as_it_is_to_the_bit():
    training = model()
    target = training._target[0]
    before = {name: x.clone() for name, x in target.state_dict().items()}
    tokens = models.random_tokens(20)[None]
    logits = target(tokens).logits
    optimizer = torch.optim.SGD(training.parameters(), lr=1.0)
    training(**batch())["loss"].backward()
    optimizer.step()
    assert torch.equal(target(tokens).logits, logits)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name
    own = {name for name, _ in training.named_parameters()}
    assert all(name.startswith("drafter.") for name in own)


def test_every_weight_gets_a_gradient():
    training = model()
    training(**batch())["loss"].backward()
    for name, parameter in training.named_parameters():
        is_empty = not parameter.numel()  # what was not asked for
        assert is_empty or parameter.grad.any(), name


def test_a_full_view_alone_sees_no_budget():
    training = model(sparse_weight=0.0)
    training(**batch())
    assert set(training.metrics) == {
        "losses_full",
        "agreements_full",
        "acceptances_full",
    }


def test_gradients_in_pieces_are_those_at_once():
    found = []
    for chunk in (0, 7):
        training = model(sparse_weight=0.0)
        training._objective.loss_chunk_tokens = chunk

        random.seed(0)
        training(**batch())["loss"].backward()
        found.append({n: p.grad for n, p in training.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
