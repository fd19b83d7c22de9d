"""Policies by name."""

import importlib
import inspect
from types import ModuleType

from budgetdraft_kernels import reference
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.errors import ConfigurationError, short
from vllm_budgetdraft.eviction.base import EvictionPolicy
from vllm_budgetdraft.eviction.chunk_retrieval import ChunkRetrieval
from vllm_budgetdraft.eviction.heavy_hitter import HeavyHitter
from vllm_budgetdraft.eviction.keep_all import KeepAll
from vllm_budgetdraft.eviction.key_diversity import KeyDiversity
from vllm_budgetdraft.eviction.last_query import LastQuery
from vllm_budgetdraft.eviction.observation_window import ObservationWindow
from vllm_budgetdraft.eviction.sink_window import SinkWindow

POLICIES: dict[str, type[EvictionPolicy]] = {
    "chunk_retrieval": ChunkRetrieval,
    "observation_window": ObservationWindow,
    "heavy_hitter": HeavyHitter,
    "last_query": LastQuery,
    "key_diversity": KeyDiversity,
    "sink_window": SinkWindow,
    "keep_all": KeepAll,
}


def make_policy(
    settings: EvictionSettings, operations: ModuleType = reference
) -> EvictionPolicy:
    """Builds the policy that ``settings.eviction_policy`` names.

    Args:
        operations: what it computes with, ``budgetdraft_kernels.reference`` or
            ``fused``.

    Raises:
        ConfigurationError: a 'package.module:Class' that cannot be imported, or is no
            ``EvictionPolicy``.
    """
    name = settings.eviction_policy
    if name in POLICIES:
        return POLICIES[name](settings, operations)
    module_name, _, class_name = name.partition(":")
    try:
        policy_class = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:  # whatever the module does
        raise ConfigurationError(
            f"eviction_policy={name!r:.100} cannot be imported "
            f"({type(error).__name__}: {short(error)}); use one of "
            f"{', '.join(POLICIES)}, or a 'package.module:Class' on the Python path"
        ) from error
    if (
        not isinstance(policy_class, type)
        or not issubclass(policy_class, EvictionPolicy)
        or inspect.isabstract(policy_class)
    ):
        raise ConfigurationError(
            f"eviction_policy={name!r:.100} is no complete subclass of "
            f"{EvictionPolicy.__module__}.{EvictionPolicy.__name__}; derive it from "
            "that, with its own select"
        )
    return policy_class(settings, operations)
