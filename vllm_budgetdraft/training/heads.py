"""What training an EAGLE-3 head begins with, and what it cannot do."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from vllm_budgetdraft.attention.paged import MAX_WIDTH
from vllm_budgetdraft.drafter.checkpoint import (
    EMBEDDING,
    WEIGHTS,
    embeddings_of,
    load_drafter,
)
from vllm_budgetdraft.drafter.configuration import check_drafter_config, head_dim
from vllm_budgetdraft.drafter.feature_checkpoint import (
    DEFAULTS,
    load_feature_drafter,
    read_feature_config,
)
from vllm_budgetdraft.drafter.feature_checkpoint import EMBEDDING as OWN_EMBEDDING
from vllm_budgetdraft.drafter.feature_modeling import (
    FeatureDrafter,
    default_aux_layers,
)
from vllm_budgetdraft.drafter.modeling import initialise
from vllm_budgetdraft.drafter.weights import StoredWeights
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.arguments import (
    AcceptanceArguments,
    DataArguments,
    DrafterArguments,
    FeatureArguments,
    ObjectiveArguments,
)


def make_head(
    arguments: DrafterArguments,
    features: FeatureArguments,
    checkpoint: str | None,
    target: PreTrainedModel,
    draft_ids: Tensor | None,
    window: int,
) -> tuple[FeatureDrafter, bool]:
    """The head to train, in float32, with its target's embeddings, which do not learn.

    Args:
        checkpoint: that the run goes on from, if any, which then says all of it.
        draft_ids: [n] int64, of a new head, the tokens to draft; all if None.
        window: tokens of the longest window.

    Returns:
        It, and whether its folder has embeddings, which then are its own.

    Raises:
        ConfigurationError: a head of a target of other sizes, or layers that the target
            does not have.
        UnsupportedDrafterError: see ``load_feature_drafter`` and
            ``check_drafter_config``.
    """
    embedding = embeddings_of(target)[EMBEDDING].to("cpu", torch.float32)
    folder = checkpoint or arguments.drafter
    has_embedding = False
    if folder is None:
        layers = read_layers(features.aux_layers, target.config)
        drafter = _new_head(arguments, target, embedding, layers, draft_ids, window)
    else:
        config = read_feature_config(folder)
        _check_sizes(folder, config, target.config)
        has_embedding = not StoredWeights(Path(folder), WEIGHTS).lacks(OWN_EMBEDDING)
        drafter = load_feature_drafter(
            folder, max_positions=window, embedding=embedding
        )
        layers = read_layers(config.aux_layers, target.config)
        drafter.aux_layers = drafter.config.aux_layers = layers
    drafter.train().requires_grad_(True)
    drafter.embedding.requires_grad_(False)
    if drafter.lm_head is not None:
        drafter.lm_head.requires_grad_(arguments.train_embeddings is not False)
    return drafter, has_embedding


def read_layers(asked: list[int] | None, target: PretrainedConfig) -> list[int]:
    """How many of the target's layers are passed before each state, ascending.

    Args:
        asked: by default, those that vLLM takes by itself: early, half way and late.

    Raises:
        ConfigurationError: there are not as many, or one is named twice.
    """
    has = target.num_hidden_layers
    layers = sorted(asked or default_aux_layers(has))
    if not 0 < layers[0] <= layers[-1] < has or len(set(layers)) < len(layers):
        raise ConfigurationError(
            f"aux_layers={layers}: an EAGLE-3 head reads different layers, of which "
            f"this target has 1 to {has - 1}; name others"
        )
    return layers


def _new_head(
    arguments: DrafterArguments,
    model: PreTrainedModel,
    embedding: Tensor,
    layers: list[int],
    draft_ids: Tensor | None,
    window: int,
) -> FeatureDrafter:
    """One layer of the target's sizes.

    It begins with the target's last layer, over the latest of the states that it reads,
    and with its last norm and output matrix.
    """
    target = model.config
    check_drafter_config(target, arguments.target)
    ids = None if draft_ids is None else draft_ids.sort().values
    config = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=head_dim(target),
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=target.rms_norm_eps,
        rope_parameters=target.rope_parameters,
        tie_word_embeddings=False,
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
        pad_token_id=target.pad_token_id,
    )
    for key, value in DEFAULTS.items():
        setattr(config, key, value)
    config.draft_vocab_size = target.vocab_size if ids is None else len(ids)
    config.target_hidden_size = target.hidden_size
    config.aux_layers, config.num_aux_layers = layers, len(layers)
    drafter = FeatureDrafter(config, window)
    drafter.embedding = nn.Parameter(torch.empty(0))
    initialise(drafter)
    drafter.embedding = nn.Parameter(embedding)
    drafter.draft_ids = ids
    end = load_drafter(
        arguments.target,
        max_positions=1,
        layers=[target.num_hidden_layers - 1],
        embeddings=embeddings_of(model),
    )
    with torch.no_grad():
        assert drafter.lm_head is not None
        drafter.lm_head.copy_(end.head if ids is None else end.head[ids])
        drafter.norm.copy_(end.norm)
        drafter.fc_weight.zero_()
        drafter.fc_weight[:, -target.hidden_size :].fill_diagonal_(1.0)
        own: Any = drafter.layers[0]
        last: Any = end.layers[0]
        own.hidden_norm.copy_(last.input_norm)
        own.qkv_weight[:, -target.hidden_size :].copy_(last.qkv_weight)
        for name in ("o_weight", "mlp_norm", "gate_up_weight", "down_weight"):
            getattr(own, name).copy_(getattr(last, name))
    return drafter


def _check_sizes(
    folder: str, config: PretrainedConfig, target: PretrainedConfig
) -> None:
    found = config.vocab_size, config.hidden_size, config.target_hidden_size
    wanted = target.vocab_size, target.hidden_size, target.hidden_size
    if found != wanted:
        raise ConfigurationError(
            f"{folder} has vocab_size, hidden_size and target_hidden_size "
            f"{list(found)}, and this target wants {list(wanted)}; name the target "
            "that the head is of"
        )


def check_head(
    arguments: DrafterArguments,
    features: FeatureArguments,
    data: DataArguments,
    objective: ObjectiveArguments,
    acceptance: AcceptanceArguments,
) -> None:
    """Raises ConfigurationError for options that an EAGLE-3 head does not follow."""
    if arguments.layers_alone or arguments.target_layers:
        raise ConfigurationError(
            f"layers_alone={arguments.layers_alone} and target_layers="
            f"{arguments.target_layers}: an EAGLE-3 head has a layer of its own, and "
            "its folder no embeddings; leave both out"
        )
    chosen = arguments.draft_vocabulary, features.aux_layers
    if arguments.drafter and chosen != (None, None):
        raise ConfigurationError(
            f"draft_vocabulary={chosen[0]!r} and aux_layers={chosen[1]}: an EAGLE-3 "
            f"head drafts the tokens and reads the layers that it was made for, as "
            f"{arguments.drafter} says; leave both out, or begin a new head"
        )
    if objective.teacher_cache is not None:
        raise ConfigurationError(
            "teacher_cache keeps the target's last hidden states, and an EAGLE-3 head "
            "reads those of other layers, too; leave it out"
        )
    if objective.position_weights != "uniform":
        raise ConfigurationError(
            f"position_weights={objective.position_weights!r}: the steps of an EAGLE-3 "
            "head's drafts have the weights ttt_decay ** i; set that instead"
        )
    if acceptance.eval_draft_tokens >= MAX_WIDTH:
        raise ConfigurationError(
            f"eval_draft_tokens={acceptance.eval_draft_tokens}: an EAGLE-3 head drafts "
            f"up to {MAX_WIDTH - 1} tokens; use at most so many"
        )
    if min(data.prefix_tokens) < 1:
        raise ConfigurationError(
            f"prefix_tokens={data.prefix_tokens}: an EAGLE-3 head reads what the "
            "target thought at the token before; use 1 or more"
        )
    if not 1 <= features.ttt_steps <= data.continuation_tokens:
        raise ConfigurationError(
            f"ttt_steps={features.ttt_steps} is not within 1 and continuation_tokens="
            f"{data.continuation_tokens}; change one of them"
        )
