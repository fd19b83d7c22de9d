"""A padded target computes what the small one does."""

import json

import pytest
import torch

from tests.support import models
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation import cost_padding
from vllm_budgetdraft.evaluation.cost_padding import Shape, pad

#: Of the test model, which is 48 wide and has 2 KV heads for 4 or 6 heads.
SHAPE = Shape(144, 5, 12, 3, 200)


def small_model(**changes):
    return models.random_model(models.llama(**changes)).eval()


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_and_cached_steps_are_those_of_the_small_model(is_tied):
    small = small_model(tie_word_embeddings=is_tied)
    grown = pad(small, SHAPE)
    assert grown.config.hidden_size == 3 * small.config.hidden_size
    assert len(grown.model.layers) == 5
    tokens = models.random_tokens(40)[None]
    expected, found = small(tokens), grown(tokens)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert found.past_key_values.layers[0].keys.shape[1] == 3
    following = found.logits[:, -1:].argmax(-1)
    again, theirs = (
        model(following, past_key_values=output.past_key_values).logits
        for model, output in ((grown, found), (small, expected))
    )
    torch.testing.assert_close(again, theirs, rtol=1e-4, atol=1e-4)


def test_no_rounding_is_added_in_bfloat16():
    """Sums may be taken in another order, and that is all."""
    small = small_model()
    for parameter in small.parameters():
        parameter.data = parameter.data.bfloat16().float()
    grown = pad(small, SHAPE)
    for parameter in grown.parameters():
        parameter.data = parameter.data.bfloat16().float()
    tokens = models.random_tokens(40)[None]
    torch.testing.assert_close(
        grown(tokens).logits, small(tokens).logits, rtol=1e-4, atol=1e-4
    )


def test_added_heads_and_neurons_are_not_zero():
    grown = pad(small_model(), SHAPE)
    layer = grown.model.layers[0]
    keys = layer.self_attn.k_proj.weight.view(3, -1, grown.config.hidden_size)
    assert (keys[2] != 0).all()
    assert (layer.mlp.gate_proj.weight[-1] != 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers: the model has"),
        ({"hidden_size": 190}, "190 is no multiple of the model's 48"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 4},
            "attention heads per KV head: the model has",
        ),
        ({"num_attention_heads": 13}, "choose a multiple"),
    ],
)
def test_a_shape_that_does_not_hold_the_model_is_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        pad(small_model(num_attention_heads=4), SHAPE._replace(**changes))


@pytest.mark.parametrize(
    "config", [models.qwen2(), models.llama(attention_bias=True)], ids=["qwen2", "bias"]
)
def test_what_is_no_llama_without_biases_is_refused(config):
    with pytest.raises(ConfigurationError, match="use a Llama"):
        pad(models.random_model(config), SHAPE)


def test_what_is_grown_is_made_where_the_small_model_is():
    """On a GPU, then: a 7 B one takes minutes on a CPU."""
    grown = pad(small_model().to("meta"), SHAPE)
    tensors = [*grown.parameters(), *grown.buffers()]
    assert tensors and {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_gpu_is_used_where_there_is_one(monkeypatch, has_gpu):
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(
        cost_padding, "write_padded", lambda args, device: used.append(device.type)
    )
    main("pad-target --target small --parameters 1b --output grown".split())
    assert used == ["cuda" if has_gpu else "cpu"]


def test_the_command_writes_a_folder_that_says_what_it_is(
    tmp_path, monkeypatch, capsys
):
    from tests.support.books import write_target

    write_target(tmp_path / "small")
    small = models.read_model(tmp_path / "small")
    small.generation_config.eos_token_id = [1, 2, 3]
    small.generation_config.save_pretrained(tmp_path / "small")
    heads = 2 * small.config.num_attention_heads
    width = 2 * small.config.hidden_size
    shape = Shape(width, 3, heads, 2 * small.config.num_key_value_heads, 300)
    monkeypatch.setitem(cost_padding.SHAPES, "150m", shape)
    folder = tmp_path / "grown"
    command = f"pad-target --target {tmp_path / 'small'} --size 150m --output {folder}"
    main(command.split())
    assert "M parameters" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert config["cost_padded"] == {"from": "small", "to": "150m"}
    grown = models.read_model(folder)
    assert grown.generation_config.eos_token_id == [1, 2, 3]
    tokens = models.random_tokens(20)[None] % config["vocab_size"]
    torch.testing.assert_close(
        grown(tokens).logits,
        small(tokens).logits,
        rtol=1e-4,
        atol=1e-4,
    )
    assert (folder / "tokenizer.json").is_file()


def test_the_command_takes_a_number_of_parameters(tmp_path, capsys):
    from tests.support.books import write_target

    write_target(tmp_path / "small")
    folder = tmp_path / "grown"
    command = f"pad-target --target {tmp_path / 'small'} --output {folder} "
    main([*command.split(), "--parameters", "0.01b"])
    printed = capsys.readouterr().out
    grown = models.read_model(folder)
    count = sum(parameter.numel() for parameter in grown.parameters())
    assert abs(count / 10e6 - 1) <= 0.02
    assert f"{count / 1e6:,.0f} M parameters" in printed
    assert grown.config.cost_padded == {"from": "small", "to": "0.01b"}
    with pytest.raises(SystemExit):
        main([*command.split(), "--parameters", "1b", "--size", "1b"])
    assert "not allowed with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command.split(), "--parameters", "1k"])
    assert "1,000 parameters, within 2%" in capsys.readouterr().err
