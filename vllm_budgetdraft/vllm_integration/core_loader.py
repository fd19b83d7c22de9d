"""A ``DraftProposer`` for an engine: what both runners load, log and capture."""

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.drafter.configuration import range_warning
from vllm_budgetdraft.drafter.packing import weight_bytes
from vllm_budgetdraft.proposer.draft_graphs import Capture, CudaGraphCapture
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.memory import MemoryPlan, resolve_dtype
from vllm_budgetdraft.vllm_integration.faults import logger


def load_core(vllm_config: VllmConfig, target: nn.Module) -> DraftProposer:
    """Loads the drafter beside the target, and allocates, compiles and captures all.

    To be called where vLLM loads models: only what lives after that does it count as
    used, and whatever is compiled after start-up would make a request wait.
    """
    config = vllm_config.speculative_config.settings
    max_model_len = vllm_config.model_config.max_model_len
    num_slots = vllm_config.scheduler_config.max_num_seqs
    device = next(target.parameters()).device
    dtype = resolve_dtype(config, device.type, vllm_config.model_config.dtype)
    core = DraftProposer.build(
        config,
        num_slots=num_slots,
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
        vocab_size=vllm_config.model_config.get_vocab_size(),
        seed=vllm_config.model_config.seed,
    )
    core.warm_up()
    if is_gpu(device) and not vllm_config.model_config.enforce_eager:
        capture_graphs(core, CudaGraphCapture())
    _log_memory(core, num_slots, max_model_len, dtype)
    if warning := range_warning(core.config, core.drafter.config, max_model_len):
        logger.warning(warning)
    return core


def capture_graphs(core: DraftProposer, capture: Capture) -> None:
    """Captures the drafts of every batch size, or says why they go on without."""
    try:
        num_graphs = core.capture_graphs(capture)
    except Exception as error:
        logger.warning(
            "BudgetDraft drafts without CUDA graphs, more slowly: capturing them "
            "failed with %s: %s",
            type(error).__name__,
            error,
        )
    else:
        logger.info("BudgetDraft captured %d CUDA graphs of its drafts", num_graphs)


def _log_memory(
    core: DraftProposer, num_slots: int, max_model_len: int, dtype: torch.dtype
) -> None:
    plan = MemoryPlan.of(
        core.config,
        core.drafter.config,
        num_slots=num_slots,
        max_model_len=max_model_len,
        dtype=dtype,
    )
    drafter = core.drafter
    weights = weight_bytes(drafter.config, dtype, drafter.is_packed)
    bill = plan.describe(weights=weights, scratch=core.scratch_bytes)
    logger.info("BudgetDraft memory: %s", bill)
