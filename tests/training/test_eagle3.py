"""EAGLE-3 heads learn the drafts that they make: against a plain loop, and in runs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from budgetdraft_kernels.reference import rotate
from tests.support import models
from tests.support.books import WORDS, write_target
from tests.support.heads import AUX_LAYERS, target_config, write_head
from tests.support.training_runs import history, losses
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.feature_checkpoint import load_feature_drafter
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.training.__main__ import main
from vllm_budgetdraft.training.arguments import (
    FeatureArguments,
    ObjectiveArguments,
    ViewArguments,
)
from vllm_budgetdraft.training.eagle3 import FeatureModel

PREFIX_TOKENS, CONTINUATION_TOKENS, STEPS = 30, 12, 4
WINDOW = PREFIX_TOKENS + CONTINUATION_TOKENS
TOKENS = models.random_tokens(2 * WINDOW).view(2, WINDOW)
PREFIX, CONTINUATION = TOKENS[:, :PREFIX_TOKENS], TOKENS[:, PREFIX_TOKENS:]
VIEW = ViewSettings(sink_tokens=3, local_tokens=4)


@pytest.fixture(scope="module")
def target():
    return models.random_model(target_config(), seed=1)


def read_head(folder: Path, target, **changes) -> FeatureDrafter:
    head = load_feature_drafter(
        write_head(folder, **changes),
        max_positions=128,
        embedding=target.get_input_embeddings().weight.detach(),
    )
    head.requires_grad_(True)
    head.embedding.requires_grad_(False)
    return head


def model_of(
    head, target, steps=STEPS, view=VIEW, objective=None, **views
) -> FeatureModel:
    views = {"budgets": [16], "budget_weights": [1.0], **views}
    return FeatureModel(
        head,
        target,
        ViewArguments(**views),
        ObjectiveArguments(**(objective or {"objective": "kl"})),
        view,
        FeatureArguments(ttt_steps=steps),
    )


def batch(**more) -> dict[str, Tensor]:
    return {
        "window": torch.arange(2),
        "prefix_ids": PREFIX,
        "continuation_ids": CONTINUATION,
        "counted": torch.ones_like(CONTINUATION, dtype=torch.bool),
        **more,
    }


def hidden_of(model: FeatureModel, monkeypatch) -> tuple[Tensor, Tensor]:
    """Of all steps and views, [K * V, B, C, hidden_size]; and what counts."""
    found = {}

    def loss(hidden, head, teacher, counted, names, decay):
        found["hidden"], found["counted"] = hidden, counted
        return hidden.sum()

    with monkeypatch.context() as patched:
        patched.setattr(model, "_loss", loss)
        model(**batch())
    return found["hidden"], found["counted"]


class OneSequence:
    """A head that is asked one position at a time, and its keys and values so far."""

    def __init__(self, head: FeatureDrafter) -> None:
        self.head = head
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def step(self, token: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        head = self.head
        cos, sin = head.rotary(torch.tensor([len(self.keys)]))

        def attend(layer: int, qkv: Tensor, norms: object) -> Tensor:
            sizes = (head.num_heads, head.num_kv_heads, head.num_kv_heads)
            queries, keys, values = qkv[0].split(sizes)
            self.keys.append(rotate(keys, cos, sin))
            self.values.append(values)
            k, v = torch.stack(self.keys, 1), torch.stack(self.values, 1)
            return F.scaled_dot_product_attention(
                rotate(queries, cos, sin)[None, :, None],
                k[None],
                v[None],
                enable_gqa=True,
            )[:, :, 0]

        normed, after = head.step(token[None], feature[None], attend)
        return normed[0], after[0]


@torch.no_grad()
def plain_draft(head, target, ids: Tensor, row: int, step: int) -> Tensor:
    """Hidden state of a draft's step at a row, by definition."""
    output = target(ids[None], output_hidden_states=True)
    states = torch.cat([output.hidden_states[layer][0] for layer in AUX_LAYERS], -1)
    known = PREFIX_TOKENS + row - step  # tokens whose states the target has told
    sequence = OneSequence(head)
    for place in range(known):
        found, feature = sequence.step(ids[place + 1], head.combined(states[place]))
    for place in range(known, known + step):
        found, feature = sequence.step(ids[place + 1], feature)
    return found


@pytest.mark.parametrize("changes", [{}, {"norm_output": True, "fc_norm": True}])
def test_steps_are_those_of_a_draft(changes, target, tmp_path, monkeypatch):
    head = read_head(tmp_path, target, **changes)
    model = model_of(head, target, sparse_weight=0.0)
    hidden, counted = hidden_of(model, monkeypatch)
    counted = counted.view(STEPS, 2, CONTINUATION_TOKENS)
    for step in range(STEPS):
        for row in (0, 1, 3, 4, CONTINUATION_TOKENS - 1):
            assert counted[step, :, row].all() == (row >= step)
            for which, ids in enumerate(TOKENS if row >= step else ()):
                expected = plain_draft(head, target, ids, row, step)
                torch.testing.assert_close(
                    hidden[step, which, row], expected, rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize("objective", ["ce", "kl", "tv", "lk_alpha", "lk_hybrid"])
def test_one_step_is_teacher_forcing_and_others_add_theirs(objective, target, tmp_path):
    head = read_head(tmp_path, target)
    ids = head.draft_ids
    settings = {"objective": objective, "loss_chunk_tokens": 0}
    whole = {}
    for steps in (1, 2):
        model = model_of(head, target, steps, objective=settings, sparse_weight=0.0)
        whole[steps] = model(**batch())["loss"].item()
        means = model.metrics
    assert whole[1] == pytest.approx(means["losses_full"], rel=1e-5)
    size = (CONTINUATION_TOKENS - 1) / CONTINUATION_TOKENS
    if objective not in ("ce", "kl"):  # whose labels must be drafted, too
        second = whole[1] + 0.8 * size * means["losses_full_step_1"]
        assert whole[2] == pytest.approx(second, rel=1e-5)
    if objective != "ce":
        return
    labels = target(TOKENS).logits.argmax(-1)[:, PREFIX_TOKENS:]
    terms = []
    for which, row in torch.cartesian_prod(torch.arange(2), torch.arange(6)).tolist():
        place = (ids == labels[which, row]).nonzero()
        if len(place):
            hidden = plain_draft(head, target, TOKENS[which], row, 0)
            terms.append(-head.logits(hidden).log_softmax(-1)[place[0, 0]].item())
    counted = torch.zeros(2, CONTINUATION_TOKENS, dtype=torch.bool)
    counted[:, :6] = True
    model = model_of(head, target, 1, objective=settings, sparse_weight=0.0)
    found = model(**batch(counted=counted))["loss"].item()
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-3)


RELATIVE = {"position_mode": "cache_relative", "draft_prefill": "streaming"}


@pytest.mark.parametrize(
    ("changes", "budget", "is_cut"),
    [
        ({}, 16, True),
        (RELATIVE, 16, True),
        ({"eviction_policy": "heavy_hitter"}, 16, True),
        ({"eviction_policy": "keep_all"}, 16, False),
        ({}, 29, None),  # the prefix that a head reads is a token shorter
    ],
)
def test_a_budget_cuts_the_prefix_and_no_steps(
    changes, budget, is_cut, target, tmp_path, monkeypatch
):
    head = read_head(tmp_path, target)
    view = VIEW.model_copy(update=changes)
    views = {"budgets": [budget], "budget_weights": [1.0]}
    found, _ = hidden_of(model_of(head, target, view=view, **views), monkeypatch)
    if is_cut is None:
        assert len(found) == STEPS
        return
    full, sparse = found.unflatten(0, (STEPS, 2)).unbind(1)
    if is_cut:
        assert not torch.allclose(full, sparse, rtol=1e-2)
    else:
        torch.testing.assert_close(sparse, full, rtol=1e-4, atol=1e-5)
    alone, _ = hidden_of(
        model_of(head, target, view=view, sparse_weight=0.0), monkeypatch
    )
    torch.testing.assert_close(alone, full, rtol=1e-4, atol=1e-5)


def test_every_weight_gets_a_finite_gradient_in_pieces_as_at_once(target, tmp_path):
    head = read_head(tmp_path, target)
    found = []
    for chunk in (0, 5):
        settings = {"objective": "kl", "loss_chunk_tokens": chunk}
        model = model_of(head, target, objective=settings)
        model(**batch())["loss"].backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    for name, gradient in found[0].items():
        if name == "drafter.embedding":
            assert gradient is None, "it is the target's"
            continue
        assert gradient.isfinite().all() and gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_stored_tokens_are_labels_and_the_target_runs_once(
    target, tmp_path, monkeypatch
):
    head = read_head(tmp_path, target)
    next_ids = models.random_tokens(2 * CONTINUATION_TOKENS, seed=3).view(2, -1)
    calls = []
    forward = target.base_model.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(target.base_model, "forward", counting)
    found = []
    for more in ({}, {"next_ids": next_ids}):
        model = model_of(head, target, objective={"objective": "ce"})
        found.append(model(**batch(**more))["loss"].item())
        assert len(calls) == len(found)
    assert found[0] != found[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_target(folder / "target", num_hidden_layers=4)
    words = " ".join(WORDS[3 * i % 24] for i in range(2000))  # a refrain of 8 words
    (folder / "song.jsonl").write_text(json.dumps({"text": words}) + "\n")
    return folder


def train(inputs: Path, output: Path, *more: str, steps: int = 4) -> None:
    arguments = f"""
        --target {inputs / "target"} --texts {inputs / "song.jsonl"}
        --drafter_type eagle3 --ttt_steps 3
        --prefix_tokens 40 --continuation_tokens 16
        --budgets 16 20 --budget_weights 0.5 0.5 --local_tokens 4 --sink_tokens 3
        --per_device_train_batch_size 4 --learning_rate 0.01 --max_steps {steps}
        --lr_scheduler_type constant --logging_steps 1 --save_steps 2
        --report_to none --disable_tqdm true --use_cpu --output_dir {output}
    """
    words = arguments.split()
    if "--drafter" not in more:
        words += ["--aux_layers", "1", "2", "3"]
    main([*words, *more])


def test_a_run_writes_a_head_and_goes_on_where_it_was_stopped(inputs, tmp_path):
    vocabulary = ("--draft_vocabulary", "40")
    train(inputs, tmp_path / "whole", *vocabulary)
    train(inputs, tmp_path / "parts", *vocabulary, steps=2)
    train(inputs, tmp_path / "parts", *vocabulary, "--resume_from_checkpoint", "true")
    whole, parts = (
        load_file(tmp_path / each / "checkpoint-4" / "model.safetensors")
        for each in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and "embed_tokens.weight" not in whole
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=name)

    folder = tmp_path / "whole"
    target = models.read_model(inputs / "target")
    embedding = target.get_input_embeddings().weight.detach()
    head = load_feature_drafter(folder, max_positions=64, embedding=embedding)
    assert head.lm_head.shape == (40, 48) and len(head.draft_ids) == 40
    assert head.aux_layers == [1, 2, 3]
    assert load_file(folder / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert config["budgetdraft"]["budgets"] == [16, 20]
    card = (folder / "README.md").read_text()
    assert "EAGLE-3 head of" in card and "drafts 40 of the 97 tokens" in card
    assert "`d2t` of its weights" in card
    assert not (folder / "draft_vocabulary.st").exists()

    first = losses(folder / "checkpoint-4")[0]
    train(inputs, tmp_path / "more", "--drafter", str(folder), steps=2)
    assert losses(tmp_path / "more" / "checkpoint-2")[0] < first
    train(inputs, tmp_path / "frozen", "--train_embeddings", "false", steps=2)
    rows = load_file(tmp_path / "frozen" / "checkpoint-2" / "model.safetensors")
    assert torch.equal(rows["lm_head.weight"], target.lm_head.weight)


def test_its_acceptance_is_measured_while_it_is_trained(inputs, tmp_path):
    asked = f"""
        --eval_strategy steps --eval_steps 2 --eval_texts {inputs / "song.jsonl"}
        --eval_contexts 30 --eval_prompts 2 --eval_budgets 16 --eval_temperatures 0 1
        --eval_new_tokens 8 --eval_draft_tokens 2
    """
    train(inputs, tmp_path, *asked.split())
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    found = [row for row in state["log_history"] if "eval_acceptance_length" in row]
    assert [row["step"] for row in found] == [2, 4]
    names = {name for row in found for name in row if "context_30" in name}
    assert len(names) == 2  # of one budget at two temperatures
    assert all(1 <= row[name] <= 3 for row in found for name in names)
    assert "Not measured" not in (tmp_path / "README.md").read_text()


def test_the_loss_of_every_step_falls(inputs, tmp_path):
    quiet = ("--save_steps", "60", "--objective", "ce")
    train(inputs, tmp_path, *quiet, steps=60)
    entries = [e for e in history(tmp_path / "checkpoint-60") if "loss" in e]
    for name in ("losses_full", "losses_full_step_1", "losses_full_step_2"):
        assert entries[-1][name] < 0.5 * entries[0][name], name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher_cache", "states"], "those of other layers"),
        (["--eval_draft_tokens", "32"], "drafts up to 31 tokens"),
        (["--layers_alone", "true"], "a layer of its own"),
        (["--target_layers", "1"], "a layer of its own"),
        (["--position_weights", "dpace"], "ttt_decay ** i"),
        (["--prefix_tokens", "0"], "at the token before"),
        (["--ttt_steps", "17"], "ttt_steps=17 is not within"),
        (["--aux_layers", "1", "4"], "has 1 to 3"),
        (["--aux_layers", "2", "2"], "has 1 to 3"),
        (["--drafter", "HEAD", "--draft_vocabulary", "9"], "that it was made for"),
        (["--drafter", "HEAD"], "the target that the head is of"),
        (["--gradient_checkpointing", "true"], "is one layer"),
    ],
)
def test_what_cannot_be_is_said(more, message, inputs, tmp_path, capsys):
    wide = write_head(tmp_path / "HEAD", target_hidden_size=64)
    more = [str(wide) if word == "HEAD" else word for word in more]
    with pytest.raises(SystemExit):
        train(inputs, tmp_path, *more)
    assert message in capsys.readouterr().err
