"""Which tokens a drafter drafts, where these are a part of its vocabulary.

Most of a small drafter's work is its output matrix, and most of what a target writes
are a few of its tokens (FR-Spec, https://arxiv.org/abs/2502.14856; EAGLE-3,
https://arxiv.org/abs/2503.01840). What is left out is never drafted, and verification
is as exact as before.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PretrainedConfig

from vllm_budgetdraft.errors import UnsupportedDrafterError, short
from vllm_budgetdraft.files import replace

#: Beside a drafter's weights, in the format of safetensors, and not by its ending: vLLM
#: takes every ``*.safetensors`` of a folder for weights of the model.
FILE = "draft_vocabulary.st"
#: Tensors by which a file says it: token ids, the likeliest first; or as EAGLE-3 heads
#: do, what is to be added to the place of each logit for its token's id.
IDS, OFFSETS = "ids", "d2t"


def read_token_ids(file: Path, vocab_size: int) -> Tensor:
    """Token ids [n] int64 as a file has them, the likeliest first.

    Those of an EAGLE-3 head are in no such order, but in that of its logits.

    Args:
        file: one that ``budgetdraft vocabulary`` wrote, or the weights of an EAGLE-3
            head.
        vocab_size: ids are below.

    Raises:
        UnsupportedDrafterError: it cannot be read, or has no such ids.
    """
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            name = IDS if IDS in names else OFFSETS
            found: Tensor | None = opened.get_tensor(name) if name in names else None
    except (OSError, SafetensorError) as error:
        raise UnsupportedDrafterError(
            f"{file} cannot be read as safetensors ({short(error)}); write it anew "
            "with budgetdraft vocabulary, or remove it"
        ) from error
    problem = ""
    if found is None:
        problem = f"has neither {IDS!r} nor {OFFSETS!r}"
    elif found.ndim != 1 or not len(found) or not _is_whole(found):
        problem = f"has {name!r} of type {found.dtype} and shape {list(found.shape)}"
    else:
        found = found.long()
        if name == OFFSETS:
            found = found + torch.arange(len(found))
        first, last = int(found.min()), int(found.max())
        if first < 0 or last >= vocab_size:
            problem = f"has the token ids {first} to {last}"
        elif len(found.unique()) < len(found):
            problem = "has token ids twice"
    if problem or found is None:
        raise UnsupportedDrafterError(
            f"{file} {problem}; a draft vocabulary is one list of whole numbers from "
            f"0 to {vocab_size - 1}, all different: write it anew with budgetdraft "
            "vocabulary, or remove it"
        )
    return found


def read_draft_vocabulary(
    folder: str | Path,
    drafter: PretrainedConfig,
    size: int | None = None,
    vocab_size: int | None = None,
) -> Tensor | None:
    """Sorted ids [n] int64 of the tokens that a drafter drafts; None for all tokens.

    Args:
        folder: of the drafter.
        drafter: its config.
        size: most tokens, the likeliest; 0 for the whole vocabulary, as if the folder
            had no file, and None for as many as the file has.
        vocab_size: the target's; the drafter's if None.

    Raises:
        UnsupportedDrafterError: see ``read_token_ids``; or the folder's file does not
            have as many.
    """
    file = Path(folder) / FILE
    if size == 0 or (size is None and not file.is_file()):
        return None
    if not file.is_file():
        raise UnsupportedDrafterError(
            f"draft_vocabulary_size={size}, but {folder} has no {FILE}, which says "
            "what is likeliest; write it with budgetdraft vocabulary, or leave the "
            "setting out"
        )
    limit = min(drafter.vocab_size, vocab_size or drafter.vocab_size)
    ids = read_token_ids(file, limit)
    if size is not None and size > len(ids):
        raise UnsupportedDrafterError(
            f"draft_vocabulary_size={size} is above the {len(ids)} tokens of {file}; "
            "lower it, or write a larger one with budgetdraft vocabulary"
        )
    return None if len(ids[:size]) == limit else ids[:size].sort().values


def write_draft_vocabulary(folder: Path, ids: Tensor) -> None:
    """Writes what ``read_draft_vocabulary`` reads, whole or not at all.

    Args:
        ids: [n] int64, the likeliest first.

    Raises:
        ConfigurationError: it cannot be written.
    """
    content = save({IDS: ids.contiguous()})
    replace(folder / FILE, lambda path: path.write_bytes(content))


def _is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
