"""Makes the speculator of model runner V2 that a config asks for."""

from typing import Any

from vllm_budgetdraft.vllm_integration.patches import table
from vllm_budgetdraft.vllm_integration.v2.adaptive_schedule import every_length
from vllm_budgetdraft.vllm_integration.v2.feature_speculator import FeatureSpeculator
from vllm_budgetdraft.vllm_integration.v2.own_cache_speculator import (
    OwnCacheSpeculator,
)
from vllm_budgetdraft.vllm_integration.v2.speculator import Speculator
from vllm_budgetdraft.vllm_integration.v2.target_speculator import TargetSpeculator

KINDS: dict[str, type[Speculator]] = {
    "decoder": OwnCacheSpeculator,
    "eagle3": FeatureSpeculator,
    "flexdraft": TargetSpeculator,
}


def make_speculator(vllm_config: Any, device: Any, req_states: Any) -> Speculator:
    """Called where vLLM makes its own, before a worker loads its model."""
    table.apply("worker")
    config = vllm_config.speculative_config
    if config.settings.adaptive_draft_length:
        # Which lengths the worker captures graphs of verification for.
        config.num_speculative_tokens_per_batch_size = every_length(
            config.num_speculative_tokens
        )
    kind = KINDS[config.settings.drafter_type]
    return kind(vllm_config, device, req_states)
