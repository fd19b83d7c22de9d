"""A FlexDraft folder: small, and of one target only."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.drafter.feature_checkpoint import is_feature_drafter
from vllm_budgetdraft.drafter.weights import StoredWeights, write_weights
from vllm_budgetdraft.errors import UnsupportedDrafterError
from vllm_budgetdraft.flexdraft.modeling import FlexDraft

MODEL_TYPE = "flexdraft"
KEYS = (
    *("num_layers", "calibration_rank", "sees_bonus", "chains"),
    *("draft_tokens", "target", "fingerprint"),
)
#: Parameters that are 0 in folders which were written before there were any.
BIASES = ("calibration_in_bias", "calibration_out_bias")
#: Rows of the embedding that tell a target from others of the same norms.
EMBEDDING_ROWS = 8


def is_flexdraft(folder: str | Path) -> bool:
    """Whether a folder says that it holds one."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return isinstance(raw, dict) and raw.get("model_type") == MODEL_TYPE


def drafter_type(config: BudgetDraftConfig) -> str:
    """What the drafter's folder holds, where the config leaves that open."""
    if config.drafter_type != "auto":
        return config.drafter_type
    if is_flexdraft(config.model):
        return "flexdraft"
    return "eagle3" if is_feature_drafter(config.model) else "decoder"


def read_flexdraft_config(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` says, the keys of ``KEYS`` at least.

    Raises:
        UnsupportedDrafterError: there is none, or it lacks a key.
    """
    path = Path(folder) / "config.json"
    if not is_flexdraft(folder):
        raise UnsupportedDrafterError(
            f"model={str(folder)!r} holds no config.json of model_type "
            f"{MODEL_TYPE!r}; give a folder that training wrote with --drafter_type "
            "flexdraft"
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if missing := set(KEYS) - set(config):
        raise UnsupportedDrafterError(
            f"{path} lacks the keys {sorted(missing)}; take it as training wrote it"
        )
    return config


@torch.no_grad()
def fingerprint(target: Any) -> str:
    """Tells targets apart: of their norms, and the embeddings of some tokens.

    Computed in bfloat16, it is the same for every type that a target is loaded in.
    """
    decoder = target.model
    norms = [decoder.norm]
    for layer in decoder.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    weights = [norm.weight for norm in norms]
    weights.append(decoder.embed_tokens.weight[:EMBEDDING_ROWS])
    found = hashlib.sha256()
    for weight in weights:
        bits = weight.detach().to("cpu", torch.bfloat16).contiguous()
        found.update(bits.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def load_flexdraft(
    folder: str | Path,
    target: Any,
    *,
    max_positions: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    has_all_of_target: bool = True,
) -> FlexDraft:
    """The drafter in a folder, for the target that it was trained with.

    Args:
        target: a causal language model of ``transformers`` or vLLM.
        max_positions: positions stay below.
        has_all_of_target: False where the target's embeddings begin on another rank,
            which sees whether it is the right one.

    Raises:
        UnsupportedDrafterError: the folder holds none, or one for another target; see
            also ``StoredWeights``.
    """
    config = read_flexdraft_config(folder)
    if has_all_of_target and (found := fingerprint(target)) != config["fingerprint"]:
        raise UnsupportedDrafterError(
            f"model={str(folder)!r} was trained for the target {config['target']!r} "
            f"(fingerprint {config['fingerprint']}); this is another one ({found}); "
            "serve that target, or train a drafter for this one"
        )
    drafter = FlexDraft(
        target.config,
        num_layers=config["num_layers"],
        calibration_rank=config["calibration_rank"],
        sees_bonus=config["sees_bonus"],
        drafts_blind=config.get("drafts_blind", not config["sees_bonus"]),
        chains=config["chains"],
        max_positions=max_positions,
    )
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise UnsupportedDrafterError(
            f"{path}, the drafter's weights, is missing; copy it along with config.json"
        )
    stored = StoredWeights(path.parent, path.name)
    state = {name: stored.read(name) for name in stored}
    for name in BIASES:
        state.setdefault(name, torch.zeros_like(getattr(drafter, name)))
    expected = {name: x.shape for name, x in drafter.state_dict().items()}
    if {name: x.shape for name, x in state.items()} != expected:
        raise UnsupportedDrafterError(
            f"{path} does not hold the weights that config.json speaks of; train or "
            "copy it anew"
        )
    drafter.load_state_dict(state)
    return drafter.to(device=device, dtype=dtype).eval().requires_grad_(False)


def save_flexdraft(
    drafter: FlexDraft,
    folder: str | Path,
    settings: dict[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes a folder that ``load_flexdraft`` reads.

    Args:
        settings: what else ``read_flexdraft_config`` finds: draft_tokens, target,
            fingerprint, and how it was trained.
        state: weights to write instead of the drafter's, under the same names.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": MODEL_TYPE,
        "num_layers": drafter.num_layers,
        "calibration_rank": drafter.calibration_rank,
        "sees_bonus": drafter.sees_bonus,
        "drafts_blind": drafter.drafts_blind,
        "chains": drafter.chains,
        **settings,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    state = drafter.state_dict() if state is None else state
    write_weights(
        folder / "model.safetensors",
        {name: x.to("cpu", dtype).contiguous() for name, x in state.items()},
    )
