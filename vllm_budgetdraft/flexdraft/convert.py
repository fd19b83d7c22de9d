"""``budgetdraft convert-flexdraft``: a drafter as FlexDraft's authors release them.

Their folders hold a Qwen3 model of the tuned layers, with the target's own norms and
MLPs beside the projections, and do not say which target's they are; ours hold what was
tuned, and the target's fingerprint.
"""

import json
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from vllm_budgetdraft.drafter.join import of_target
from vllm_budgetdraft.errors import UnsupportedDrafterError
from vllm_budgetdraft.files import whole_folder

#: Where their config keeps what is about drafting; released folders have the second.
SECTIONS = ("flexdraft_config", "dflash_config")
#: What comes along, and is never used: the target's is.
OF_THE_TARGET = (
    r"norm\.weight|rotary_emb\..*|"
    r"layers\.\d+\.(mlp\..*|(input|post_attention)_layernorm\.weight)"
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="folder, or name on the hub")
    parser.add_argument(
        "--released",
        required=True,
        metavar="FOLDER",
        help="with config.json and safetensors weights",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")


def run(args: Namespace) -> None:
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    target = of_target(args.target, load, dtype="auto")
    convert(Path(args.released), target, Path(args.target).name, Path(args.output))
    print(f"Written to {args.output}.")


def convert(released: Path, target: Any, name: str, output: Path) -> None:
    """Writes a folder that ``load_flexdraft`` reads, in the type of the weights.

    Args:
        target: that it was trained for; a causal language model of ``transformers``.
        name: the target's.

    Raises:
        UnsupportedDrafterError: the folder holds none, or one that goes through other
            layers than the last, or whose weights do not fit the target.
    """
    from vllm_budgetdraft.flexdraft.checkpoint import fingerprint, save_flexdraft
    from vllm_budgetdraft.flexdraft.modeling import FlexDraft

    config = _read_config(released)
    weights = _read_weights(released)
    num_layers, depth = config["num_hidden_layers"], target.config.num_hidden_layers
    trained = config.get("num_target_layers", depth)
    last = list(range(depth - num_layers, depth))
    layers = _section(config)["target_layer_ids"]
    if trained != depth or num_layers > depth or layers != last:
        raise UnsupportedDrafterError(
            f"model={str(released)!r} goes through the layers {layers} of a target of "
            f"{trained}; {name} has {depth} layers, of which the last {num_layers} are "
            "expected; give the target that it was trained for"
        )
    calibration = weights.get("anchor_bias_mlp.0.weight")
    drafter = FlexDraft(
        target.config,
        num_layers=num_layers,
        calibration_rank=0 if calibration is None else len(calibration),
        max_positions=1,
    )
    state = _renamed(weights, num_layers)
    has = {each: tuple(x.shape) for each, x in state.items()}
    # What is not there, as the calibration of a drafter without one, holds nothing.
    needs = {k: tuple(x.shape) for k, x in drafter.state_dict().items() if x.numel()}
    if has != needs:
        different = sorted({each for each, _ in has.items() ^ needs.items()})
        raise UnsupportedDrafterError(
            f"the weights in {released} do not fit {name}: {different} are missing, "
            "unknown, or of other shapes; give the target that it was trained for, or "
            "download the folder anew"
        )
    drafter.load_state_dict(state, strict=False)
    settings = {
        "target": name,
        "fingerprint": fingerprint(target),
        "draft_tokens": config["block_size"] - 1,
    }
    with whole_folder(output) as made:
        save_flexdraft(drafter, made, settings, dtype=state["mask_embedding"].dtype)


def _read_config(released: Path) -> dict[str, Any]:
    path = released / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UnsupportedDrafterError(
            f"{path} cannot be read ({error}); give the folder of a FlexDraft as its "
            "authors release them"
        ) from error
    held = config if isinstance(config, dict) else {}
    needed = {"num_hidden_layers": held, "block_size": held}
    # Where it is missing, their code goes from the second layer on, or fails.
    needed["target_layer_ids"] = _section(held)
    for key, place in needed.items():
        if key not in place:
            raise UnsupportedDrafterError(
                f"{path} has no {key!r}; give the folder of a FlexDraft as its authors "
                "release them"
            )
    return config


def _section(config: dict[str, Any]) -> dict[str, Any]:
    """What is about drafting; empty if there is nothing."""
    found = [config[each] for each in SECTIONS if config.get(each)]
    return found[0] if found and isinstance(found[0], dict) else {}


def _read_weights(released: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(released.glob("*.safetensors"))
    if not files:
        raise UnsupportedDrafterError(
            f"{released} holds no *.safetensors; download its weights, too"
        )
    try:
        return {name: x for file in files for name, x in load_file(file).items()}
    except SafetensorError as error:
        raise UnsupportedDrafterError(
            f"the weights in {released} cannot be read ({error}); download them anew"
        ) from error


def _renamed(theirs: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """By our names, less what of the target's comes along, and has no part in drafts.

    What is neither keeps its name.
    """
    import torch

    names = {
        "mask_embedding": "mask_embedding",
        "anchor_bias_mlp.0.weight": "calibration_in",
        "anchor_bias_mlp.0.bias": "calibration_in_bias",
        "anchor_bias_mlp.2.weight": "calibration_out",
        "anchor_bias_mlp.2.bias": "calibration_out_bias",
    }
    stacked, of_qkv = {}, set()
    for layer in range(num_layers):
        attention, own = f"layers.{layer}.self_attn.", f"layers.{layer}."
        for each in ("q_norm", "k_norm"):
            names[f"{attention}{each}.weight"] = own + each
        for kind in ("weight", "bias"):
            names[f"{attention}o_proj.{kind}"] = f"{own}o_{kind}"
            parts = [f"{attention}{each}_proj.{kind}" for each in "qkv"]
            of_qkv.update(parts)
            if all(part in theirs for part in parts):
                stacked[f"{own}qkv_{kind}"] = torch.cat([theirs[p] for p in parts])
    others = {
        name: x
        for name, x in theirs.items()
        if name not in of_qkv and not re.fullmatch(OF_THE_TARGET, name)
    }
    return {names.get(name, name): x for name, x in others.items()} | stacked
