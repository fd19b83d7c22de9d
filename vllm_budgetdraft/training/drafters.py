"""What training begins with: the target, and a drafter of either type."""

import math
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.utils import logging

from vllm_budgetdraft.drafter.checkpoint import (
    EMBEDDING,
    LM_HEAD,
    embeddings_of,
    load_drafter,
)
from vllm_budgetdraft.drafter.configuration import check_drafter_config
from vllm_budgetdraft.drafter.draft_vocabulary import FILE, read_token_ids
from vllm_budgetdraft.drafter.join import of_target
from vllm_budgetdraft.drafter.modeling import Drafter, initialise
from vllm_budgetdraft.drafter.vocabulary import check_vocabulary
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.flexdraft.checkpoint import load_flexdraft
from vllm_budgetdraft.flexdraft.modeling import FlexDraft, begin_as_target
from vllm_budgetdraft.training.arguments import DrafterArguments, FlexDraftArguments
from vllm_budgetdraft.training.inputs import Inputs
from vllm_budgetdraft.training.vocabulary_counts import (
    count_tokens,
    kept_tokens,
    likeliest_tokens,
)

logger = logging.get_logger(__name__)

#: FlexDraft's own depth (section 2.1), where a third of the target is more.
MOST_MASK_LAYERS = 10


def read_target(folder: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """What is known of a target before it is loaded.

    Raises:
        ConfigurationError: there is no such model.
    """
    config = of_target(folder, AutoConfig.from_pretrained)
    return config, of_target(folder, AutoTokenizer.from_pretrained)


def load_target(folder: str, arguments: TrainingArguments) -> PreTrainedModel:
    """On the device that trains, in bfloat16 if that is what it trains in.

    Raises:
        ConfigurationError: there is no such model.
    """
    dtype = torch.bfloat16 if arguments.bf16 else None
    target = of_target(folder, AutoModelForCausalLM.from_pretrained, dtype=dtype)
    return target.to(arguments.device)


def make_drafter(
    arguments: DrafterArguments, model: PreTrainedModel, window: int
) -> Drafter:
    """The drafter to train: one from a folder, slices of the target, or a new Llama.

    It gets the target's vocabulary; rows that it lacks begin as its mean row.

    Args:
        model: the target.
        window: tokens of the longest window.

    Raises:
        ConfigurationError: embeddings that are not there are to be kept, or those that
            are to be left out are not the target's.
        UnsupportedDrafterError: see ``load_drafter`` and ``check_vocabulary``.
    """
    target = model.config
    if arguments.drafter and check_vocabulary(
        arguments.drafter, target.vocab_size, arguments.target
    ):
        logger.info("the drafter gets the target's vocab_size=%d", target.vocab_size)
    if arguments.drafter or arguments.target_layers:
        drafter = load_drafter(
            arguments.drafter or arguments.target,
            max_positions=window,
            layers=None if arguments.drafter else arguments.target_layers,
            embeddings=embeddings_of(model),
            vocab_size=target.vocab_size,
        )
    else:
        drafter = _new_drafter(arguments, model, window)
    drafter.train().requires_grad_(True)
    learns = arguments.train_embeddings
    if learns is None:
        learns = drafter.config.hidden_size != target.hidden_size
    for name in ("embedding", "lm_head"):
        if (matrix := getattr(drafter, name)) is not None:
            matrix.requires_grad_(learns)
    if arguments.layers_alone and (learns or not _has_embeddings_of(drafter, model)):
        raise ConfigurationError(
            "layers_alone=True leaves out embeddings that are the target's, and this "
            "drafter's are its own; leave the option out, or begin with the target's "
            "and set train_embeddings=False"
        )
    return drafter


def _has_embeddings_of(drafter: Drafter, model: PreTrainedModel) -> bool:
    """As they are written, in bfloat16."""
    found = embeddings_of(model)
    pairs = [(drafter.embedding, found[EMBEDDING]), (drafter.head, found[LM_HEAD])]
    return all(torch.equal(x.bfloat16(), y.cpu().bfloat16()) for x, y in pairs)


def _new_drafter(
    arguments: DrafterArguments, model: PreTrainedModel, window: int
) -> Drafter:
    target = model.config
    is_as_wide = arguments.hidden_size == target.hidden_size
    if arguments.train_embeddings is False and not is_as_wide:
        raise ConfigurationError(
            f"train_embeddings=False keeps the target's embeddings, which are "
            f"{target.hidden_size} wide, in a new drafter with hidden_size="
            f"{arguments.hidden_size}; make the two equal, or train them"
        )
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=target.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        num_key_value_heads=arguments.num_key_value_heads,
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=target.rms_norm_eps,
        rope_parameters=target.rope_parameters,
        tie_word_embeddings=not is_as_wide or target.tie_word_embeddings,
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
        pad_token_id=target.pad_token_id,
    )
    drafter = Drafter(config, window)
    initialise(drafter)
    if is_as_wide:
        found = embeddings_of(model)
        with torch.no_grad():
            drafter.embedding.copy_(found[EMBEDDING])
            if drafter.lm_head is not None:
                drafter.lm_head.copy_(found[LM_HEAD])
    return drafter


def make_flexdraft(
    arguments: DrafterArguments,
    flexdraft: FlexDraftArguments,
    target: PreTrainedModel,
    window: int,
) -> FlexDraft:
    """One from a folder, or a new one that begins with the target's projections.

    Args:
        window: tokens of the longest window.

    Raises:
        ConfigurationError: more layers than the target has, or layers_alone.
        UnsupportedDrafterError: see ``load_flexdraft`` and ``check_drafter_config``.
    """
    check_drafter_config(target.config, arguments.target)
    if arguments.layers_alone:
        raise ConfigurationError(
            "layers_alone=True leaves out embeddings, and a flexdraft has none; leave "
            "the option out"
        )
    if arguments.drafter:
        drafter = load_flexdraft(arguments.drafter, target, max_positions=window)
        return drafter.train().requires_grad_(True)
    has = target.config.num_hidden_layers
    num_layers = flexdraft.mask_layers or min(MOST_MASK_LAYERS, math.ceil(has / 3))
    if num_layers > has:
        raise ConfigurationError(
            f"mask_layers={num_layers}, but the target has {has} layers; use fewer"
        )
    drafter = FlexDraft(
        target.config,
        num_layers=num_layers,
        calibration_rank=flexdraft.calibration_rank,
        sees_bonus=flexdraft.sees_bonus,
        drafts_blind=flexdraft.blind_fraction > 0 or not flexdraft.sees_bonus,
        chains=flexdraft.chains,
        max_positions=window,
    )
    begin_as_target(drafter, target)
    return drafter


def choose_draft_vocabulary(
    arguments: DrafterArguments,
    checkpoint: str | None,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> Tensor | None:
    """Token ids [n] int64, the likeliest first; None for the whole vocabulary.

    Args:
        checkpoint: that the run goes on from, if any; with an EAGLE-3 head it has them.
        vocab_size: the target's.

    Raises:
        ConfigurationError: of a flexdraft; or see ``likeliest_tokens``.
        UnsupportedDrafterError: see ``read_token_ids``.
    """
    asked = arguments.draft_vocabulary
    if arguments.drafter_type == "flexdraft":
        if asked is not None:
            raise ConfigurationError(
                f"draft_vocabulary={asked!r}: a flexdraft drafts by its target's own "
                "output matrix, all of it; leave the option out"
            )
        return None
    if arguments.drafter_type == "eagle3" and (checkpoint or arguments.drafter):
        return None  # the folder's weights are of them alone
    if asked is None:
        folder = checkpoint or arguments.drafter
        if folder is None or not (Path(folder) / FILE).is_file():
            return None
        return read_token_ids(Path(folder) / FILE, vocab_size)
    size = None
    if re.fullmatch(r"-?\d+", asked):
        size = int(asked)
    elif not Path(asked).is_file():
        raise ConfigurationError(
            f"draft_vocabulary={asked!r} is no file, and no number of tokens; give one "
            "of these"
        )
    if size == 0:
        return None
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for rows, column in inputs.learnt:
        counts += count_tokens(rows, column, vocab_size)
    if size is None:
        ids = read_token_ids(Path(asked), vocab_size)
        if (ids.diff() > 0).all():  # as EAGLE-3 heads have them: it says nothing
            ids = ids[counts[ids].sort(descending=True, stable=True).indices]
        return ids
    kept = [token for token in kept_tokens(tokenizer) if token < vocab_size]
    return likeliest_tokens(counts, kept, size)
