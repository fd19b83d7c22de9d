"""Every setting, declared once: JSON keys, command line and README share this list."""

from vllm_budgetdraft.config.parsing import (
    FOREIGN_KEYS,
    RequestSettings,
    compare_views,
    parse_request_settings,
    parse_speculative_config,
    settle,
    valid,
)
from vllm_budgetdraft.config.speculative import (
    CACHE_SETTINGS,
    BudgetDraftConfig,
    SettledConfig,
    check_flexdraft_settings,
)
from vllm_budgetdraft.config.view import (
    BUILT_IN_POLICIES,
    EvictionSettings,
    ViewSettings,
)

__all__ = [
    "BUILT_IN_POLICIES",
    "CACHE_SETTINGS",
    "FOREIGN_KEYS",
    "BudgetDraftConfig",
    "EvictionSettings",
    "RequestSettings",
    "SettledConfig",
    "ViewSettings",
    "check_flexdraft_settings",
    "compare_views",
    "parse_request_settings",
    "parse_speculative_config",
    "settle",
    "valid",
]
