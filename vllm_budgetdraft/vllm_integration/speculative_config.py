"""The SpeculativeConfig that carries our settings to every process."""

import hashlib
from importlib.metadata import entry_points
from typing import Any, Literal

import torch
import vllm
from pydantic import Field
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.config.utils import config
from vllm.platforms import current_platform

from vllm_budgetdraft.attention.backend import is_gpu, select_operations
from vllm_budgetdraft.attention.paged import MAX_WIDTH
from vllm_budgetdraft.config import (
    CACHE_SETTINGS,
    BudgetDraftConfig,
    SettledConfig,
    check_flexdraft_settings,
    compare_views,
    parse_speculative_config,
    settle,
)
from vllm_budgetdraft.drafter.checkpoint import check_weights
from vllm_budgetdraft.drafter.configuration import (
    check_drafter_config,
    check_trained,
    folder_of,
    read_drafter_config,
    trained_view,
)
from vllm_budgetdraft.drafter.draft_vocabulary import read_draft_vocabulary
from vllm_budgetdraft.drafter.feature_checkpoint import (
    check_feature_weights,
    read_feature_config,
)
from vllm_budgetdraft.drafter.feature_modeling import default_aux_layers
from vllm_budgetdraft.drafter.vocabulary import check_vocabulary
from vllm_budgetdraft.errors import (
    ConfigurationError,
    UnsupportedDrafterError,
    UnsupportedVllmError,
)
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.flexdraft.checkpoint import drafter_type, read_flexdraft_config
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.proposer.memory import MemoryPlan, resolve_dtype
from vllm_budgetdraft.vllm_integration.compatibility import (
    check_vllm_version,
    schedules_custom_class_ahead,
)
from vllm_budgetdraft.vllm_integration.faults import logger
from vllm_budgetdraft.vllm_integration.patches import table

PROPOSER = "vllm_budgetdraft.vllm_integration.v1.proposer.BudgetDraftProposer"


@config
class BudgetDraftSpeculativeConfig(SpeculativeConfig):
    """vLLM's config of a "custom_class" proposer, and ours within.

    A subclass and not ``additional_config``, which enters the hash of the target's
    compile cache: each other ``kv_budget`` would compile the target anew.
    """

    budgetdraft: dict[str, Any] = Field(default_factory=dict)

    @property
    def settings(self) -> SettledConfig:
        return SettledConfig(**self.budgetdraft)

    def compute_hash(self) -> str:
        """Of what the target's compiled graph depends on.

        That is what a head asks of it, which vLLM adds for its own heads by the names
        of methods, and the layers that mask tokens may go through.
        """
        found, settings = super().compute_hash(), self.settings
        asked: Any = None
        if settings.drafter_type == "eagle3":
            asked = read_feature_config(settings.model).aux_layers
        elif settings.drafter_type == "flexdraft":
            layers = read_flexdraft_config(settings.model)["num_layers"]
            asked = settings.flex_decoding, layers
        if asked is None:
            return found
        return hashlib.sha256(f"{found} {asked}".encode()).hexdigest()

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.budgetdraft.items())
        return f"SpeculativeConfig(method='budgetdraft', {settings})"


# Here, for the engine core is handed a config that another process made.
table.apply("config")


def make_config(
    settings: dict[str, Any], target_model_config: Any, target_parallel_config: Any
) -> BudgetDraftSpeculativeConfig:
    """Checks everything that can be checked before the target's weights load.

    Only processes that users talk to call this; they learn to check requests, too.

    Args:
        settings: the user's speculative config, less ``method``.

    Raises:
        UnsupportedVllmError: this vLLM, pipeline parallelism, or logits processors
            that were installed as plugins of vLLM.
        ConfigurationError, UnsupportedDrafterError: see the called functions.
    """
    check_vllm_version(vllm.__version__)
    ours = parse_speculative_config(settings)
    ours = ours.model_copy(update={"model": folder_of(ours.model)})
    stages = target_parallel_config.pipeline_parallel_size
    if stages > 1:
        raise UnsupportedVllmError(
            f"pipeline_parallel_size={stages}: vLLM's model runner V1 has no drafter "
            "on any stage but the last, and fails there under every speculative "
            "method; use pipeline_parallel_size=1, with tensor parallelism instead"
        )
    if processors := entry_points(group="vllm.logits_processors"):
        raise UnsupportedVllmError(
            f"installed logits processors {[each.name for each in processors]}: vLLM "
            "does not apply them where it verifies drafts; uninstall what brings them, "
            "or do without speculation"
        )
    select_operations(
        ours.attention_backend, torch.device(current_platform.device_type)
    )
    kind = drafter_type(ours)
    if kind == "flexdraft":
        settled = _check_flexdraft(ours, target_model_config, target_parallel_config)
    elif kind == "eagle3":
        settled = _check_eagle3(ours, target_model_config)
    else:
        settled = _check_decoder(ours, target_model_config)
    if kind != "flexdraft" and "flex_decoding" in ours.model_fields_set:
        raise ConfigurationError(
            f"flex_decoding={ours.flex_decoding!r} is about flexdraft drafters, and "
            f"{ours.model} is none; leave it out"
        )
    if settled.adaptive_draft_length == "auto" and (
        target_parallel_config.data_parallel_size > 1
        # Each rank has a scheduler, and only the first one's times.
        or target_parallel_config.distributed_executor_backend == "external_launcher"
    ):
        settled = settled.model_copy(update={"adaptive_draft_length": False})
    return BudgetDraftSpeculativeConfig(
        method="custom_class",
        model=PROPOSER,
        num_speculative_tokens=ours.num_speculative_tokens,
        num_speculative_tokens_per_batch_size=(
            ours.num_speculative_tokens_per_batch_size
        ),
        budgetdraft=settled.model_dump(exclude_unset=True),
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
    )


def compare_vocabularies(drafter: str, target: Any) -> str | None:
    """See ``check_vocabulary``.

    Args:
        target: vLLM's ModelConfig.
    """
    return check_vocabulary(
        drafter,
        target.get_vocab_size(),
        target.tokenizer,
        revision=target.tokenizer_revision,
        trust_remote_code=target.trust_remote_code,
    )


def only_on_v1(vllm_config: VllmConfig) -> list[str]:
    """What is asked for that needs vLLM's model runner V1, as vLLM names features.

    With a threshold, drafts tell how many of them are worth verifying. V2's scheduler
    has said that before there are any, where it schedules ahead.
    """
    config: SettledConfig = vllm_config.speculative_config.settings
    needs = {
        "budgetdraft's draft_confidence_threshold with asynchronous scheduling": (
            config.draft_confidence_threshold and _may_schedule_ahead(vllm_config)
        ),
        # Each rank has a scheduler there, and only the first one drafts.
        "budgetdraft's draft_confidence_threshold with an external launcher": (
            config.draft_confidence_threshold
            and vllm_config.parallel_config.distributed_executor_backend
            == "external_launcher"
        ),
        # Ranks would verify different numbers of drafts, and wait for each other.
        "budgetdraft's adaptive_draft_length with data parallelism": (
            config.adaptive_draft_length is True
            and vllm_config.parallel_config.data_parallel_size > 1
        ),
    }
    return [feature for feature, needed in needs.items() if needed]


def _may_schedule_ahead(vllm_config: VllmConfig) -> bool:
    """Whether vLLM will, or has yet to decide; it asks before and after it has."""
    asked = vllm_config.scheduler_config.async_scheduling
    if asked is None:
        return schedules_custom_class_ahead(vllm.__version__)
    return bool(asked)


def _settle(
    config: BudgetDraftConfig,
    trained: dict[str, Any],
    kind: Literal["decoder", "eagle3", "flexdraft"],
) -> SettledConfig:
    taken, different = compare_views(config, trained)
    if taken:
        logger.info("BudgetDraft drafts as the drafter was trained: %s", taken)
    if different:
        logger.warning(
            "the drafter was trained with other settings: %s; fewer drafts may be "
            "accepted; leave these out to draft as it was trained",
            different,
        )
    return settle(config, trained, kind)


def _check_decoder(config: BudgetDraftConfig, target: Any) -> SettledConfig:
    drafter = read_drafter_config(config.model)
    settled = _settle(config, trained_view(drafter), "decoder")
    make_policy(settled)
    if note := compare_vocabularies(config.model, target):
        logger.info("BudgetDraft vocabulary: %s", note)
    drafted = read_draft_vocabulary(
        config.model, drafter, settled.draft_vocabulary_size, target.get_vocab_size()
    )
    if drafted is not None:
        logger.info(
            "BudgetDraft vocabulary: %d of %d tokens are drafted",
            len(drafted),
            target.get_vocab_size(),
        )
    MemoryPlan.of(
        settled,
        drafter,
        num_slots=1,  # at least; how many there will be is not known here
        max_model_len=target.max_model_len,
        dtype=resolve_dtype(config, current_platform.device_type, target.dtype),
    )
    check_weights(config.model, drafter)
    return settled


def _check_eagle3(config: BudgetDraftConfig, target: Any) -> SettledConfig:
    head = read_feature_config(config.model)
    settled = _settle(config, trained_view(head), "eagle3")
    make_policy(settled)
    for what, ours, theirs in (
        ("states that it reads", head.target_hidden_size, target.get_hidden_size()),
        ("vocabulary", head.vocab_size, target.get_vocab_size()),
    ):
        if ours != theirs:
            raise UnsupportedDrafterError(
                f"{config.model} is an EAGLE-3 head of another target: its {what} are "
                f"{ours} wide, the target's {theirs}; give a head of this target"
            )
    has = target.get_total_num_hidden_layers()
    layers = head.aux_layers or default_aux_layers(has)
    if not 0 <= min(layers) <= max(layers) <= has or (
        len(set(layers)) != head.num_aux_layers
    ):
        raise UnsupportedDrafterError(
            f"{config.model} is an EAGLE-3 head of {head.num_aux_layers} layers of its "
            f"target, {layers}, and this target has {has}; give a head of this target"
        )
    if config.num_speculative_tokens >= MAX_WIDTH:
        raise ConfigurationError(
            f"num_speculative_tokens={config.num_speculative_tokens}: an EAGLE-3 head "
            f"drafts up to {MAX_WIDTH - 1} tokens; use at most so many"
        )
    MemoryPlan.of(
        settled,
        head,
        num_slots=1,  # at least; how many there will be is not known here
        max_model_len=target.max_model_len,
        dtype=resolve_dtype(config, current_platform.device_type, target.dtype),
    )
    shares = head.hidden_size == target.get_hidden_size()
    check_feature_weights(config.model, head, has_embedding=shares)
    return settled


def _check_flexdraft(
    config: BudgetDraftConfig, target: Any, parallel: Any
) -> SettledConfig:
    check_flexdraft_settings(config)
    found = read_flexdraft_config(config.model)
    trained = check_trained(found.get("budgetdraft"))
    # Of the target's cache there is nothing to say.
    policy = {k: v for k, v in trained.items() if k not in CACHE_SETTINGS}
    settled = _settle(config, policy, "flexdraft")
    PageSelector(settled, page_size=1)
    drafts_blind = found.get("drafts_blind", not found["sees_bonus"])
    if config.flex_decoding == "parallel" and not drafts_blind:
        raise ConfigurationError(
            f"flex_decoding='parallel': mask tokens of {config.model} must know the "
            "bonus token, which verification has yet to find; use 'sequential', or "
            "train with blind_fraction"
        )
    if config.num_speculative_tokens >= MAX_WIDTH:
        raise ConfigurationError(
            f"num_speculative_tokens={config.num_speculative_tokens}: flexdraft drafts "
            f"up to {MAX_WIDTH - 1} tokens; use at most that number"
        )
    if config.num_speculative_tokens > found["draft_tokens"]:
        raise ConfigurationError(
            f"num_speculative_tokens={config.num_speculative_tokens}, but the drafter "
            f"was trained for {found['draft_tokens']} (draft_tokens of its "
            "config.json); use at most so many"
        )
    check_drafter_config(target.hf_text_config, "the target")
    if target.get_sliding_window() is not None:
        raise UnsupportedDrafterError(
            f"the target has a sliding window of {target.get_sliding_window()} tokens; "
            "flexdraft drafts for targets that see all of their context"
        )
    device = torch.device(current_platform.device_type)
    if config.flex_decoding == "parallel" and is_gpu(device):
        if not target.enforce_eager:
            raise UnsupportedVllmError(
                "flex_decoding='parallel' where the target runs as CUDA graphs, which "
                "would not have the mask tokens in them; use enforce_eager=True, or "
                "flex_decoding='auto'"
            )
    if (ranks := getattr(parallel, "decode_context_parallel_size", 1)) > 1:
        raise UnsupportedVllmError(
            f"decode_context_parallel_size={ranks}: flexdraft reads contexts that lie "
            "on one rank; use 1, or a drafter that is a decoder"
        )
    if parallel.tensor_parallel_size > 1:
        return _settle_for_ranks(settled, parallel.tensor_parallel_size)
    return settled


def _settle_for_ranks(config: SettledConfig, num_ranks: int) -> SettledConfig:
    """Of a flexdraft, for which all ranks must draft as many, and in one mode."""
    if config.adaptive_draft_length is True or config.flex_decoding == "parallel":
        raise UnsupportedVllmError(
            f"adaptive_draft_length={config.adaptive_draft_length} and flex_decoding="
            f"{config.flex_decoding!r} with tensor_parallel_size={num_ranks}: ranks of "
            "a flexdraft drafter would wait for each other; leave both out"
        )
    changes = {"adaptive_draft_length": False, "flex_decoding": "sequential"}
    return config.model_copy(update=changes)
