"""A larger Llama that computes what a small one computes, at its own cost.

Where no large pretrained model is at hand, real text and real acceptance come from a
small trained target, and time and memory from its padded twin: every matrix is really
multiplied, every key really stored. Results made with one must say so.
"""

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
)

from vllm_budgetdraft.attention.backend import default_device
from vllm_budgetdraft.drafter.join import of_target
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation.cost_shapes import (
    SHAPES,
    Shape,
    derive_shape,
    parse_count,
)
from vllm_budgetdraft.files import whole_folder


def run(args: Namespace) -> None:
    """``budgetdraft pad-target``, on a GPU where there is one."""
    write_padded(args, default_device())


def write_padded(args: Namespace, device: torch.device) -> None:
    """Writes the folder; a model of 7 B takes seconds on a GPU, minutes on a CPU.

    Raises:
        ConfigurationError: no such model or no Llama, no shape of that size that holds
            it, or a folder that cannot be written to.
    """
    small = of_target(args.target, AutoModelForCausalLM.from_pretrained, dtype="auto")
    small = small.to(device)
    size = args.parameters or args.size
    check_can_be_padded(small.config)
    shape = (
        derive_shape(small.config, parse_count(args.parameters))
        if args.parameters
        else SHAPES[args.size]
    )
    grown = pad(small, shape)
    grown.config.cost_padded = {"from": Path(args.target).name, "to": size}
    # What ends a text is the small model's matter.
    grown.generation_config = small.generation_config
    tokenizer = of_target(args.target, AutoTokenizer.from_pretrained)
    with whole_folder(Path(args.output)) as made:
        grown.save_pretrained(made)
        tokenizer.save_pretrained(made)
    count = sum(parameter.numel() for parameter in grown.parameters())
    print(
        f"{args.output}: {count / 1e6:,.0f} M parameters, the logits of {args.target}; "
        + ", ".join(f"{name} {value}" for name, value in shape._asdict().items())
    )


@torch.no_grad()
def pad(small: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """A Llama of the given shape with the logits of ``small``, on its device.

    The residual stream holds several copies of the small one, all written and the
    first one read: their mean square, and so each RMSNorm, is the small model's to
    the bit, as with zeros instead it is not. Heads and neurons that are added are
    random, and nothing reads them; layers that are added write nothing.

    Raises:
        ConfigurationError: no Llama, or one that does not fit into the shape.
    """
    config = _grown_config(small.config, shape)
    with small.device:
        grown = AutoModelForCausalLM.from_config(config, dtype=small.dtype)
    factor = config.hidden_size // small.config.hidden_size
    theirs, ours = small.model, grown.model
    ours.embed_tokens.weight.copy_(theirs.embed_tokens.weight.repeat(1, factor))
    ours.norm.weight.copy_(theirs.norm.weight.repeat(factor))
    grown.lm_head.weight.zero_()
    _read(grown.lm_head.weight, small.lm_head.weight)
    for layer in ours.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for layer, old in zip(ours.layers, theirs.layers, strict=False):
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm, old_norm = getattr(layer, name), getattr(old, name)
            norm.weight.copy_(old_norm.weight.repeat(factor))
        heads, old_heads = (
            (c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads)
            for c in (config, small.config)
        )
        for name in ("q_proj", "k_proj", "v_proj"):
            new, own = (getattr(each.self_attn, name).weight for each in (layer, old))
            group, old_group = (heads[1], old_heads[1]) if name == "q_proj" else (1, 1)
            _read(
                new.view(heads[0], group, -1, new.shape[1])[: old_heads[0], :old_group],
                own.view(old_heads[0], old_group, -1, own.shape[1]),
            )
        new, own = layer.self_attn.o_proj.weight, old.self_attn.o_proj.weight
        new = new.view(factor, own.shape[0], *heads, -1)
        new[:, :, : old_heads[0], : old_heads[1]] = own.view(len(own), *old_heads, -1)
        for name in ("gate_proj", "up_proj"):
            new, own = (getattr(each.mlp, name).weight for each in (layer, old))
            _read(new[: len(own)], own)
        new, own = layer.mlp.down_proj.weight, old.mlp.down_proj.weight
        new.view(factor, len(own), -1)[..., : own.shape[1]] = own
    return grown


def _read(new: Tensor, old: Tensor) -> None:
    """Rows that read the first copy of the residual stream, and no other."""
    new.zero_()
    new[..., : old.shape[-1]] = old


def check_can_be_padded(small: Any) -> None:
    """Raises ConfigurationError where a model with this config cannot be padded."""
    if small.model_type != "llama" or small.attention_bias or small.mlp_bias:
        raise ConfigurationError(
            f"a {small.model_type} with attention_bias="
            f"{getattr(small, 'attention_bias', None)} cannot be padded; use a Llama "
            "without biases"
        )


def _grown_config(small: Any, shape: Shape) -> LlamaConfig:
    check_can_be_padded(small)
    ratios = "attention heads per KV head"
    sizes = {
        name: (getattr(small, name), getattr(shape, name)) for name in shape._fields
    } | {
        ratios: tuple(
            each.num_attention_heads // each.num_key_value_heads
            for each in (small, shape)
        )
    }
    for name, (old, new) in sizes.items():
        if new < old:
            raise ConfigurationError(
                f"{name}: the model has {old}, the shape only {new}; choose a larger "
                "shape"
            )
    if shape.hidden_size % small.hidden_size:
        raise ConfigurationError(
            f"hidden_size: the shape's {shape.hidden_size} is no multiple of the "
            f"model's {small.hidden_size}; choose another shape"
        )
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ConfigurationError(
            f"{shape.num_attention_heads} attention heads cannot share "
            f"{shape.num_key_value_heads} KV heads; choose a multiple"
        )
    config = copy.deepcopy(small)
    config.update(
        {name: new for name, (_, new) in sizes.items() if name != ratios}
        | {"tie_word_embeddings": False}
    )
    return config
