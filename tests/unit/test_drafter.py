import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config

from tests.support import models
from vllm_budgetdraft.drafter.checkpoint import load_drafter, save_drafter
from vllm_budgetdraft.drafter.configuration import folder_of, read_drafter_config
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.errors import UnsupportedDrafterError
from vllm_budgetdraft.training.views import View, continuation_hidden

CONFIGS = {
    "llama": models.llama(),
    "llama_tied": models.llama(tie_word_embeddings=True),
    "llama_biased": models.llama(attention_bias=True, mlp_bias=True),
    "llama_without_grouped_queries": models.llama(num_key_value_heads=6),
    "llama_with_derived_head_dim": models.llama(head_dim=None),
    "llama_one_layer": models.llama(num_hidden_layers=1),
    "llama_other_epsilon_and_theta": models.llama(
        rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "mistral": models.mistral(),
    "mistral_tied": models.mistral(tie_word_embeddings=True),
    "qwen2": models.qwen2(),
    "qwen2_tied": models.qwen2(tie_word_embeddings=True),
    "qwen3": models.qwen3(),
    "qwen3_biased_and_tied": models.qwen3(
        attention_bias=True, tie_word_embeddings=True
    ),
    "linear_rope": models.llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama3_rope": models.llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "yarn_rope": models.qwen3(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "attention_factor": 1.7,
            "original_max_position_embeddings": 64,
        }
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def logits_of(drafter: Drafter, tokens: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of a plain forward pass."""
    (hidden,) = continuation_hidden(drafter, tokens, [View([], [], 0)])
    return drafter.logits(hidden)


def load(folder: Path) -> Drafter:
    return load_drafter(folder, max_positions=256)


def refusal_of(folder: Path) -> str:
    with pytest.raises(UnsupportedDrafterError) as refusal:
        load(folder)
    return str(refusal.value)


@pytest.fixture
def folder(drafter_folder: Path, tmp_path: Path) -> Path:
    """A drafter's folder that a test may spoil."""
    return Path(shutil.copytree(drafter_folder, tmp_path / "spoilt"))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@every_config
def test_logits_equal_those_of_transformers(config, tmp_path):
    folder = models.write_model(tmp_path, config)
    tokens = models.random_tokens(2 * 150).view(2, 150)
    expected = models.read_model(folder)(tokens).logits
    assert expected.std() > 0.3, "the model is too flat to tell anything"
    error = (logits_of(load(folder), tokens) - expected).abs().max()
    assert error < 1e-4


@every_config
def test_a_saved_drafter_loads_in_transformers_with_equal_logits(config, tmp_path):
    drafter = load(models.write_model(tmp_path / "read", config))
    save_drafter(drafter, tmp_path / "written", dtype=torch.float32)
    tokens = models.random_tokens(40)[None]
    before = logits_of(drafter, tokens)
    theirs = models.read_model(tmp_path / "written")(tokens).logits
    assert (theirs - before).abs().max() < 1e-4
    assert torch.equal(logits_of(load(tmp_path / "written"), tokens), before)


def test_a_saved_drafter_keeps_its_notes_and_brings_its_tokenizer(
    drafter_folder, tmp_path
):
    drafter = load(drafter_folder)
    drafter.config.budgetdraft = {"budgets": [256, 512]}
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "tokenizer.json").write_text("{}")
    save_drafter(drafter, tmp_path / "new", tokenizer_from=tmp_path / "target")
    config = read_drafter_config(tmp_path / "new")
    assert config.budgetdraft == {"budgets": [256, 512]}
    assert config.dtype == torch.bfloat16
    weights = load_file(tmp_path / "new" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"


def test_weights_in_several_files_are_all_read(drafter_folder, tmp_path):
    model = models.read_model(drafter_folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = models.random_tokens(20)[None]
    error = (logits_of(load(tmp_path), tokens) - model(tokens).logits).abs().max()
    assert error < 1e-4


def test_a_missing_file_of_several_is_named(drafter_folder, tmp_path):
    models.read_model(drafter_folder).save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    assert f"{lost} is missing" in refusal_of(tmp_path)


def test_serving_precision_is_what_was_asked_for(drafter_folder):
    drafter = load_drafter(drafter_folder, max_positions=8, dtype=torch.bfloat16)
    tensors = [*drafter.parameters(), *drafter.buffers()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_folder_of_pickled_weights_alone_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refusal_of(folder)
    assert str(folder / "model.safetensors") in message
    assert "safetensors only" in message


def test_a_file_that_is_no_safetensors_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"not at all")
    assert "model.safetensors is not safetensors" in refusal_of(folder)


def test_another_architecture_is_refused_by_name(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=models.VOCAB_SIZE)
    models.write_model(tmp_path, config)
    message = refusal_of(tmp_path)
    assert "GPT2LMHeadModel" in message and "LlamaForCausalLM" in message


def test_a_folder_that_names_no_architecture_is_refused(folder):
    change_config(folder, architectures=None)
    assert "of no named architecture" in refusal_of(folder)


def test_a_borrowed_architecture_name_is_not_believed(folder):
    change_config(folder, model_type="gemma")
    assert "model_type='gemma'" in refusal_of(folder)


def test_a_folder_without_config_is_refused_by_name(tmp_path):
    missing = tmp_path / "nowhere"
    message = refusal_of(missing)
    assert str(missing) in message and "config.json" in message


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    assert f"{folder / 'config.json'} is not JSON" in refusal_of(folder)


def test_a_config_that_transformers_refuses_is_refused(folder):
    change_config(folder, head_dim=None, hidden_size=47)
    assert f"{folder / 'config.json'} is no valid config" in refusal_of(folder)


def test_a_rope_that_depends_on_the_length_is_refused_by_name(folder):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    change_config(folder, rope_parameters=rope)
    message = refusal_of(folder)
    assert "rope_type='dynamic'" in message and "yarn" in message


def test_another_activation_is_refused_by_name(folder):
    change_config(folder, hidden_act="gelu")
    message = refusal_of(folder)
    assert "hidden_act='gelu'" in message and "silu" in message


@pytest.mark.parametrize(
    ("changes", "weight", "shape"),
    [
        ({"intermediate_size": 72}, "mlp.gate_proj.weight", "(72, 48)"),
        ({"vocab_size": 98}, "model.embed_tokens.weight", "(98, 48)"),
        ({"num_attention_heads": 8}, "self_attn.q_proj.weight", "(80, 48)"),
    ],
)
def test_weights_of_other_shapes_than_the_config_are_named(
    folder, changes, weight, shape
):
    change_config(folder, **changes)
    message = refusal_of(folder)
    assert weight in message and shape in message


def test_missing_weights_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    assert "lacks the weights model.layers.1.self_attn.k_proj.weight," in refusal_of(
        folder
    )


def test_a_name_is_looked_up_in_the_hubs_cache(drafter_folder, tmp_path, monkeypatch):
    """As hf download leaves it there; nothing is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--drafter" / "snapshots" / ("a" * 40)
    shutil.copytree(drafter_folder, snapshot)
    (tmp_path / "models--some--drafter" / "refs").mkdir()
    (tmp_path / "models--some--drafter" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert folder_of("some/drafter") == str(snapshot)
    with pytest.raises(UnsupportedDrafterError, match="hf download some/other"):
        folder_of("some/other")


def test_a_folder_is_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "drafter").mkdir()
    assert folder_of("~/drafter") == str(tmp_path / "drafter")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "drafter").mkdir(parents=True)
    assert folder_of("some/drafter") == "some/drafter"
    assert folder_of("/nowhere/at/all") == "/nowhere/at/all"  # refused when it is read


@pytest.mark.parametrize(
    ("content", "mention"),
    [
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'"text"', "holds a str"),
        ('{"a": "caf\u00e9"}'.encode("latin-1"), "cannot be read"),
        (b'{"a":' * 40_000, "cannot be read"),
        (b'{"architectures": 7}', "is 7; drafters are one of"),
        (b'{"architectures": [7]}', "is [7]; drafters are one of"),
    ],
)
def test_a_config_of_something_else_is_refused(folder, content, mention):
    (folder / "config.json").write_bytes(content)
    assert mention in refusal_of(folder)


@pytest.mark.parametrize("value", [-1, 0, 2.5, True, 10**9, 10**30])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "head_dim"])
def test_sizes_that_are_none_are_refused(folder, name, value):
    change_config(folder, **{name: value})
    message = refusal_of(folder)
    assert name in message or "no valid config" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": "10000.0"},
        {"rope_theta": [1e4]},
        {"rope_theta": -1e4},
        {"rope_theta": float("nan")},
        {"rope_type": "linear", "factor": [2.0]},
        {"rope_type": "linear", "factor": None},
        {"rope_type": "yarn", "rope_theta": True, "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": float("inf")},
    ],
)
def test_rotary_parameters_that_give_no_angles_are_refused(folder, changes):
    rope = {"rope_type": "default", "rope_theta": 1e4, **changes}
    change_config(folder, rope_parameters=rope)
    message = refusal_of(folder)
    assert "rope_parameters=" in message and "no finite angles" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_epsilon_that_is_none_is_refused(folder, value):
    change_config(folder, rms_norm_eps=value)
    assert f"rms_norm_eps={value}" in refusal_of(folder)


@pytest.mark.parametrize("name", ["mlp_bias", "pad_token_id"])
def test_what_transformers_says_of_a_config_is_one_short_paragraph(folder, name):
    change_config(folder, **{name: {"x" * 5000: "\n\n"}})
    message = refusal_of(folder)
    assert name in message and len(message) < 1000 and "\n" not in message


def test_an_output_matrix_that_is_stored_although_it_is_tied(folder):
    """Where it is the embedding, as some save it, it is read; or else refused."""
    change_config(folder, tie_word_embeddings=True)
    message = refusal_of(folder)
    assert "lm_head.weight that is not model.embed_tokens.weight" in message
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert load(folder).lm_head is None


@pytest.mark.parametrize("name", ["nul\0byte", "long" * 2000])
def test_a_path_that_can_be_none_is_refused(name):
    assert len(refusal_of(Path(name))) < 1000


@pytest.mark.parametrize("name", ["none", "a\0b", "x" * 5000])
def test_a_folder_that_is_not_there_is_said_to_be_none(name):
    with pytest.raises(UnsupportedDrafterError) as refused:
        read_drafter_config(name)
    said = str(refused.value)
    assert len(said) < 500
    assert ("is not JSON" in said) != ("holds no config.json" in said)
