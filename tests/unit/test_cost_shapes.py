"""A derived shape holds the model, has the parameters, and looks like a real one."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.support import models
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation.cost_padding import pad
from vllm_budgetdraft.evaluation.cost_shapes import (
    count_parameters,
    derive_shape,
    parse_count,
    shape_of,
)

#: Real ones. The first has nine heads over three KV heads.
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_68M = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
}
TINYLLAMA_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("7b", 7_000_000_000),
        ("1.5B", 1_500_000_000),
        ("350m", 350_000_000),
        (".5k", 500),
        ("7000000000", 7_000_000_000),
    ],
)
def test_a_number_of_parameters_is_read(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "b", "7g", "-7b", "7b-gqa", "1.2.3m", "1e9"])
def test_no_number_is_refused(text):
    with pytest.raises(ConfigurationError, match="give one such as 7b"):
        parse_count(text)


@pytest.mark.parametrize(
    ("small", "parameters"),
    [
        (SMOLLM2_135M, "350m"),
        (SMOLLM2_135M, "1.5b"),
        (SMOLLM2_135M, "7b"),
        (LLAMA_68M, "350m"),
        (LLAMA_68M, "7b"),
        (TINYLLAMA_1B, "1.5b"),
        (TINYLLAMA_1B, "7b"),
    ],
)
def test_a_shape_holds_the_model_within_two_percent(small, parameters):
    config = LlamaConfig(**small)
    shape = derive_shape(config, parse_count(parameters))
    own = shape_of(config)
    assert all(new >= old for new, old in zip(shape, own, strict=True))
    assert shape.hidden_size % own.hidden_size == 0
    with torch.device("meta"):
        grown = pad(AutoModelForCausalLM.from_config(config), shape)
    count = sum(parameter.numel() for parameter in grown.parameters())
    assert count == count_parameters(config, shape)
    assert abs(count / parse_count(parameters) - 1) <= 0.02


@pytest.mark.parametrize("small", [SMOLLM2_135M, LLAMA_68M])
def test_seven_billion_cost_what_a_real_model_of_them_costs(small):
    """Llama-3-8B: 4,096 wide, 32 layers, 32 heads of 128 over 8, 131 KB a token."""
    config = LlamaConfig(**small)
    width, layers, heads, kv_heads, neurons = derive_shape(config, 7_000_000_000)
    assert width == pytest.approx(4096, rel=0.1)
    assert layers == pytest.approx(32, abs=3)
    assert heads == 4 * kv_heads
    assert heads * config.head_dim == pytest.approx(width, rel=0.1)
    assert neurons == pytest.approx(3.5 * width, rel=0.1)
    cache_bytes = 2 * 2 * layers * kv_heads * config.head_dim
    assert cache_bytes == pytest.approx(131_072, rel=0.1)


def test_a_size_that_is_too_small_is_refused_with_the_smallest():
    with pytest.raises(ConfigurationError, match="which has 162,826,560 with a head"):
        derive_shape(LlamaConfig(**SMOLLM2_135M), 135_000_000)
    own = derive_shape(LlamaConfig(**SMOLLM2_135M), 162_826_560)
    assert own == shape_of(LlamaConfig(**SMOLLM2_135M))


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1},
        {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "num_hidden_layers": 7},
        {"rope_parameters": SCALED},
    ],
    ids=["3-over-1", "9-over-3", "mha", "8-over-1", "scaled-rope"],
)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_logits_are_equal_for_awkward_models(changes, is_tied, monkeypatch):
    """In float64 throughout, so that what is left is the order of sums."""
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda self, states: functional.rms_norm(
            states, self.weight.shape, self.weight, self.variance_epsilon
        ),
    )
    config = models.llama(tie_word_embeddings=is_tied, **changes)
    small = models.random_model(config).double()
    grown = pad(small, derive_shape(config, 8_000_000))
    assert grown.lm_head.weight is not grown.model.embed_tokens.weight
    tokens = models.random_tokens(40)[None]
    found, expected = (model(tokens).logits for model in (grown, small))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
