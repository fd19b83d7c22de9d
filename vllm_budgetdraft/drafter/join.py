"""``budgetdraft join``: makes a drafter of its layers and its target's embeddings.

What it writes is an ordinary checkpoint: vLLM's ``draft_model`` and ``transformers``
load it as well as this project, which is why layers are joined once and not when a
drafter is loaded.
"""

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_budgetdraft.errors import ConfigurationError, short
from vllm_budgetdraft.files import whole_folder


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="folder, or name on the hub")
    parser.add_argument(
        "--layers",
        required=True,
        metavar="FOLDER",
        help="with config.json and layers.safetensors, as training writes them with "
        "layers_alone",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")


def run(args: Namespace) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()  # or it lists every layer of the target as unread
    join(args.target, Path(args.layers), Path(args.output))
    print(f"Written to {args.output}.")


def join(target: str, layers: Path, output: Path) -> None:
    """Writes a whole drafter, in the type of its layers, with the target's tokenizer.

    Raises:
        ConfigurationError: there is no such target; or ``layers`` holds no layers, or
            those of a drafter of another width.
        UnsupportedDrafterError: see ``load_drafter``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_budgetdraft.drafter.checkpoint import (
        LAYERS,
        embeddings_of,
        load_drafter,
        save_drafter,
    )
    from vllm_budgetdraft.drafter.configuration import read_drafter_config
    from vllm_budgetdraft.drafter.draft_vocabulary import FILE

    if not (layers / LAYERS).is_file():
        raise ConfigurationError(
            f"{layers / LAYERS} is not there; give a folder that training wrote with "
            "--layers_alone true, or use the drafter as it is if it has weights"
        )
    config = read_drafter_config(layers)
    # No layer: of a large target only its embeddings are read.
    options = {"num_hidden_layers": 0, "dtype": "auto"}
    model = of_target(target, AutoModelForCausalLM.from_pretrained, **options)
    tokenizer = of_target(target, AutoTokenizer.from_pretrained)
    has, needs = model.config.hidden_size, config.hidden_size
    if has != needs or model.config.vocab_size != config.vocab_size:
        raise ConfigurationError(
            f"the embeddings of {target} have {model.config.vocab_size} rows of {has}, "
            f"and {layers} was trained with {config.vocab_size} rows of {needs}; give "
            "the target that it was trained for"
        )
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    drafter = load_drafter(
        layers, max_positions=1, dtype=dtype, embeddings=embeddings_of(model)
    )
    with whole_folder(output) as made:
        save_drafter(drafter, made, dtype=dtype)
        if has_vocabulary := (layers / FILE).is_file():
            shutil.copyfile(layers / FILE, made / FILE)
        tokenizer.save_pretrained(made)
    if not has_vocabulary:  # but perhaps the drafter that was there before
        (output / FILE).unlink(missing_ok=True)


def of_target(target: str, load: Callable[..., Any], **options: Any) -> Any:
    """What a ``from_pretrained`` loads of a target.

    Raises:
        ConfigurationError: there is no such model.
    """
    try:
        return load(target, **options)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"--target {target!r} cannot be loaded ({short(error)}); give the "
            "folder of a causal language model, or its name on the hub"
        ) from error
