"""Hugging Face folder in, Hugging Face folder out."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.drafter.weights import StoredWeights, write_weights
from vllm_budgetdraft.errors import UnsupportedDrafterError

#: Of a whole model, and of one without its embeddings.
WEIGHTS, LAYERS = "model.safetensors", "layers.safetensors"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: Our names, and the names in the folder, whose rows each stacks.
NAMES = {
    "embedding": [EMBEDDING],
    "norm": ["model.norm.weight"],
    "lm_head": [LM_HEAD],
}
LAYER_NAMES = {
    "input_norm": ["input_layernorm.weight"],
    "q_norm": ["self_attn.q_norm.weight"],
    "k_norm": ["self_attn.k_norm.weight"],
    "mlp_norm": ["post_attention_layernorm.weight"],
}
for _kind in ("weight", "bias"):
    LAYER_NAMES |= {
        f"qkv_{_kind}": [f"self_attn.{part}_proj.{_kind}" for part in "qkv"],
        f"o_{_kind}": [f"self_attn.o_proj.{_kind}"],
        f"gate_up_{_kind}": [f"mlp.{part}_proj.{_kind}" for part in ("gate", "up")],
        f"down_{_kind}": [f"mlp.down_proj.{_kind}"],
    }
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "chat_template.jinja",
)


def load_drafter(
    folder: str | Path,
    *,
    max_positions: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layers: list[int] | None = None,
    embeddings: dict[str, Tensor] | None = None,
    vocab_size: int | None = None,
    draft_ids: Tensor | None = None,
) -> Drafter:
    """Loads a Llama-family drafter, for serving or further training.

    Args:
        layers: of the folder's model, those that the drafter has; all if None.
        embeddings: the target's, as ``embeddings_of`` gives them, for a folder that
            has layers alone.
        vocab_size: the target's; the folder's own if None.
        draft_ids: see ``Drafter.keep_rows``; all rows are kept if None.

    Raises:
        UnsupportedDrafterError: see ``read_drafter_config`` and ``StoredWeights``; or
            the model has no such layer; or the folder has layers alone.
    """
    config = read_drafter_config(folder)
    weights = check_weights(folder, config, embeddings is not None)
    if layers is not None:
        _choose_layers(config, layers)
    drafter = Drafter(config, max_positions)
    given = embeddings if weights.lacks(EMBEDDING) else None
    state = {}
    for name in drafter.state_dict():
        parts = _names_in_folder(name, layers)
        state[name] = torch.cat(
            [given[p] if given and p in given else weights.read(p) for p in parts]
        )
    drafter.load_state_dict(state)
    if vocab_size not in (None, config.vocab_size):
        _fit_vocabulary(drafter, vocab_size)
    if draft_ids is not None:
        drafter.keep_rows(draft_ids)
    # The rotary table stays in float32 until here and is then rounded once.
    return drafter.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_weights(
    folder: str | Path, config: PretrainedConfig, has_embeddings: bool = False
) -> StoredWeights:
    """The weights of a folder, each read when asked for; twice-stored ones at once.

    Args:
        config: of the folder.
        has_embeddings: whether the folder need not have them.

    Raises:
        UnsupportedDrafterError: see ``load_drafter``.
    """
    stored = _stored(Path(folder), has_embeddings)
    with torch.device("meta"):
        drafter = Drafter(config, max_positions=1)
    expected = {name: tuple(x.shape) for name, x in _parts(drafter).items()}
    if stored.lacks(EMBEDDING) and has_embeddings:
        expected.pop(EMBEDDING), expected.pop(LM_HEAD, None)
    # Where it is tied to the embedding, it may be stored even so.
    both = (EMBEDDING, LM_HEAD)
    is_double = drafter.lm_head is None and not any(map(stored.lacks, both))
    if is_double:
        expected[LM_HEAD] = expected[EMBEDDING]
    stored.check(expected, ignored=(LM_HEAD,))
    if is_double and not torch.equal(*(stored.read(each).float() for each in both)):
        raise UnsupportedDrafterError(
            f"{folder} has an {LM_HEAD} that is not {EMBEDDING}, and config.json says "
            "that it is (tie_word_embeddings); they are of two models: download or "
            "copy both anew"
        )
    return stored


def save_drafter(
    drafter: Drafter,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_from: str | Path | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes a folder that loads here and as a plain ``transformers`` model.

    Args:
        tokenizer_from: folder whose tokenizer files are copied along.
        state: weights to write instead of the drafter's, under the same names.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: PretrainedConfig = drafter.config
    config.dtype = dtype
    config.save_pretrained(folder)
    write_weights(folder / WEIGHTS, hugging_face_state_dict(drafter, dtype, state))
    for name in TOKENIZER_FILES:
        source = Path(tokenizer_from or folder) / name
        if source.is_file() and source.parent != folder:
            shutil.copyfile(source, folder / name)


def keep_layers_alone(folder: Path) -> None:
    """Leaves out of a drafter's folder what ``embeddings_of`` its target has."""
    weights = load_file(folder / WEIGHTS)
    layers = {k: v for k, v in weights.items() if k not in (EMBEDDING, LM_HEAD)}
    write_weights(folder / LAYERS, layers)
    (folder / WEIGHTS).unlink()


def embeddings_of(target: PreTrainedModel) -> dict[str, Tensor]:
    """Embeddings and output matrix, [vocab_size, hidden_size] each, by their names."""
    return {
        EMBEDDING: target.get_input_embeddings().weight.detach(),
        LM_HEAD: target.get_output_embeddings().weight.detach(),
    }


def hugging_face_state_dict(
    drafter: Drafter, dtype: torch.dtype, own: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights under the names and in the parts that ``transformers`` has."""
    parts = _parts(drafter, own)
    return {name: part.to("cpu", dtype).contiguous() for name, part in parts.items()}


def _parts(drafter: Drafter, own: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """See ``hugging_face_state_dict``; views of what there is."""
    q_rows, kv_rows = (
        heads * drafter.head_dim for heads in (drafter.num_heads, drafter.num_kv_heads)
    )
    state: dict[str, Tensor] = {}
    for name, value in (own or drafter.state_dict()).items():
        parts: tuple[Tensor, ...] = (value,)
        if "qkv_" in name:
            parts = value.split((q_rows, kv_rows, kv_rows))
        elif "gate_up_" in name:
            parts = value.chunk(2)
        state |= dict(zip(_names_in_folder(name), parts, strict=True))
    return state


def _fit_vocabulary(drafter: Drafter, size: int) -> None:
    """Cuts the embedding and the output matrix, or pads them with their mean row.

    The logit of a mean row is the mean of the logits: training begins with no more than
    a fair share of the probability where there is no token.
    """
    for name in ("embedding", "lm_head"):
        matrix: Tensor | None = getattr(drafter, name)
        if matrix is not None:
            padding = matrix.mean(0).expand(max(0, size - len(matrix)), -1)
            setattr(drafter, name, nn.Parameter(torch.cat([matrix[:size], padding])))
    drafter.draft_vocab_size = min(size, drafter.config.vocab_size)
    drafter.config.vocab_size = size


def _names_in_folder(name: str, chosen: list[int] | None = None) -> list[str]:
    if name in NAMES:
        return NAMES[name]
    layers, index, own_name = name.split(".")
    place = int(index) if chosen is None else chosen[int(index)]
    return [f"model.{layers}.{place}.{part}" for part in LAYER_NAMES[own_name]]


def _choose_layers(config: PretrainedConfig, layers: list[int]) -> None:
    last = config.num_hidden_layers - 1
    if not layers or not all(0 <= layer <= last for layer in layers):
        raise UnsupportedDrafterError(
            f"layers={layers}: the model has layers 0 to {last}; choose some of them"
        )
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]


def _stored(folder: Path, apart: bool) -> StoredWeights:
    """
    Args:
        apart: whether the embeddings are the target's, if the folder has none.
    """
    if (folder / WEIGHTS).is_file() or not (folder / LAYERS).is_file():
        return StoredWeights(folder, WEIGHTS)
    if not apart:
        raise UnsupportedDrafterError(
            f"{folder} has layers alone; add its target's embeddings: budgetdraft join "
            f"--target TARGET --layers {folder} --output FOLDER"
        )
    return StoredWeights(folder, LAYERS)
