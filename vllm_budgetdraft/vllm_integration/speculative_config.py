"""The SpeculativeConfig that carries our settings to every process."""

from importlib.metadata import entry_points
from typing import Any

import torch
import vllm
from pydantic import Field
from vllm.config import SpeculativeConfig
from vllm.config.utils import config
from vllm.platforms import current_platform

from vllm_budgetdraft.attention.backend import select_operations
from vllm_budgetdraft.config import BudgetDraftConfig, parse_speculative_config
from vllm_budgetdraft.drafter.configuration import (
    check_vocabulary,
    read_drafter_config,
    settle,
)
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.proposer.memory import MemoryPlan, resolve_dtype
from vllm_budgetdraft.vllm_integration.compatibility import check_vllm_version
from vllm_budgetdraft.vllm_integration.patches import front_end

PROPOSER = "vllm_budgetdraft.vllm_integration.runner_v1.BudgetDraftProposer"


@config
class BudgetDraftSpeculativeConfig(SpeculativeConfig):
    """vLLM's config of a "custom_class" proposer, and ours within.

    A subclass and not ``additional_config``, which enters the hash of the target's
    compile cache: each other ``kv_budget`` would compile the target anew.
    """

    budgetdraft: dict[str, Any] = Field(default_factory=dict)

    @property
    def settings(self) -> BudgetDraftConfig:
        return parse_speculative_config(self.budgetdraft)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.budgetdraft.items())
        return f"SpeculativeConfig(method='budgetdraft', {settings})"


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
    make_policy(ours)
    select_operations(
        ours.attention_backend, torch.device(current_platform.device_type)
    )
    drafter = read_drafter_config(ours.model)
    check_vocabulary(drafter, target_model_config.get_vocab_size())
    max_model_len = target_model_config.max_model_len
    MemoryPlan.of(
        settle(ours, drafter, max_model_len),
        drafter,
        num_slots=1,  # at least; how many there will be is not known here
        max_model_len=max_model_len,
        dtype=resolve_dtype(
            ours, current_platform.device_type, target_model_config.dtype
        ),
    )
    front_end.apply(BudgetDraftSpeculativeConfig)
    return BudgetDraftSpeculativeConfig(
        method="custom_class",
        model=PROPOSER,
        num_speculative_tokens=ours.num_speculative_tokens,
        num_speculative_tokens_per_batch_size=(
            ours.num_speculative_tokens_per_batch_size
        ),
        budgetdraft=ours.model_dump(exclude_unset=True),
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
    )
