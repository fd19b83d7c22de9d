"""What a pretrained pair is made into: the package's weights, and the drafter's own."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_package import make_source
from vllm_budgetdraft.drafter.draft_vocabulary import write_draft_vocabulary
from vllm_budgetdraft.pretrained.gguf_llama import EMBEDDING, write_pair
from vllm_budgetdraft.pretrained.source import CONFIG, LAYERS, SOURCES, VOCABULARY


class Made(NamedTuple):
    """A tiny pair, and what it was made of."""

    target: Path
    drafter: Path
    model: Path
    layers: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("pair")
    source, _ = make_source(folder / "source")
    model = folder / "source" / "tiny.gguf"
    write_draft_vocabulary(source.drafter, torch.arange(9))
    write_pair(model, source.drafter, folder / "made")
    return Made(folder / "made/target", folder / "made/drafter", model, source.drafter)


def test_the_target_is_what_transformers_reads_from_the_same_file(made):
    model = AutoModelForCausalLM.from_pretrained(made.target)
    expected = AutoModelForCausalLM.from_pretrained(
        made.model.parent, gguf_file=made.model.name, dtype=torch.bfloat16
    )
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert model.config.num_hidden_layers == expected.config.num_hidden_layers == 2
    assert not hasattr(model.config, "budgetdraft")
    tokens = torch.arange(9)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_an_answer_ends_where_a_turn_does(made):
    ends = AutoModelForCausalLM.from_pretrained(made.target).generation_config
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (1, 2, 2)


def test_the_drafter_is_its_layers_under_the_targets_embeddings(made):
    weights = load_file(made.drafter / "model.safetensors")
    target = load_file(made.target / "model.safetensors")
    assert torch.equal(weights.pop(EMBEDDING), target[EMBEDDING])
    layers = load_file(made.layers / LAYERS)
    assert weights.keys() == layers.keys()
    assert all(torch.equal(weights[each], layers[each]) for each in layers)
    for name in (CONFIG, VOCABULARY):
        assert (made.drafter / name).read_bytes() == (made.layers / name).read_bytes()


@pytest.mark.parametrize("name", ["target", "drafter"])
def test_both_have_the_tokenizer_with_its_template(name, made):
    tokenizer = AutoTokenizer.from_pretrained(getattr(made, name))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], tokenize=False
    )
    assert chat == "<|im_start|>user\nthe<|im_end|>\n"
    assert tokenizer(chat).input_ids[-3:] == [260, 2, tokenizer("\n").input_ids[0]]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["target", "drafter"])
def test_whoever_may_read_the_config_may_read_the_weights(name, made):
    folder = getattr(made, name)
    assert len({(folder / each).stat().st_mode for each in os.listdir(folder)}) == 1


def test_the_layers_here_are_those_that_their_config_speaks_of():
    folder = SOURCES["smollm2"].drafter
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    with safe_open(folder / LAYERS, "pt") as weights:
        names = set(weights.keys())
    numbers = {name.split(".")[2] for name in names - {"model.norm.weight"}}
    assert numbers == {str(layer) for layer in range(config["num_hidden_layers"])}
    assert len(names) == 1 + 9 * config["num_hidden_layers"]
