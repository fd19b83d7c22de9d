"""A ``DraftProposer`` for an engine: what both runners load, log and capture."""

from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tp_group,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_budgetdraft.attention.backend import is_gpu, select_operations
from vllm_budgetdraft.drafter.checkpoint import WEIGHTS
from vllm_budgetdraft.drafter.configuration import range_warning
from vllm_budgetdraft.drafter.feature_checkpoint import EMBEDDING
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.drafter.folder import read_config
from vllm_budgetdraft.drafter.packing import weight_bytes
from vllm_budgetdraft.drafter.weights import StoredWeights
from vllm_budgetdraft.flexdraft.checkpoint import load_flexdraft
from vllm_budgetdraft.flexdraft.packing import pack_matrices
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.flexdraft.sharding import take_share
from vllm_budgetdraft.proposer.building import build_proposer
from vllm_budgetdraft.proposer.draft_graphs import Capture, CudaGraphCapture
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.memory import packs_matrices, resolve_dtype
from vllm_budgetdraft.proposer.warm_up import warm_up
from vllm_budgetdraft.vllm_integration.faults import logger
from vllm_budgetdraft.vllm_integration.target_cache import bind_to_target


def load_core(
    vllm_config: VllmConfig,
    target: nn.Module,
    *,
    tells_logits: bool = False,
    embedding: Tensor | None = None,
) -> DraftProposer:
    """Loads the drafter beside the target, and allocates, compiles and captures all.

    To be called where vLLM loads models: only what lives after that does it count as
    used, and whatever is compiled after start-up would make a request wait.

    Args:
        tells_logits, embedding: see ``build_proposer``.
    """
    config = vllm_config.speculative_config.settings
    max_model_len = vllm_config.model_config.max_model_len
    num_slots = vllm_config.scheduler_config.max_num_seqs
    device = next(target.parameters()).device
    dtype = resolve_dtype(config, device.type, vllm_config.model_config.dtype)
    core = build_proposer(
        config,
        num_slots=num_slots,
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
        vocab_size=vllm_config.model_config.get_vocab_size(),
        seed=vllm_config.model_config.seed,
        batch_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        target_cost=_target_cost(vllm_config),
        tells_logits=tells_logits,
        embedding=None if embedding is None else embedding.to(dtype),
    )
    warm_up(core)
    if is_gpu(device) and not vllm_config.model_config.enforce_eager:
        capture_graphs(core, CudaGraphCapture())
    is_alone = vllm_config.parallel_config.tensor_parallel_size == 1
    _log_memory(core, vllm_config.model_config.dtype if is_alone else None)
    if warning := range_warning(core.config, core.drafter.config, max_model_len):
        logger.warning(warning)
    return core


def load_mask_core(
    vllm_config: VllmConfig, target: nn.Module, *, tells_logits: bool = False
) -> MaskProposer:
    """Loads a flexdraft drafter, which needs the target's cache to go on.

    Every rank must call this: each drafts with its part of the target's layers.

    Args:
        tells_logits: see ``build_proposer``.
    """
    config = vllm_config.speculative_config.settings
    device = next(target.parameters()).device
    max_model_len = vllm_config.model_config.max_model_len
    group = get_tp_group()
    rank, num_ranks = group.rank_in_group, group.world_size
    dtype = vllm_config.model_config.dtype
    drafter = load_flexdraft(
        config.model,
        target,
        max_positions=max_model_len + config.num_speculative_tokens + 1,
        dtype=dtype,
        device=device,
        has_all_of_target=rank == 0,
    )
    if num_ranks > 1:
        take_share(drafter, rank, num_ranks)
        drafter.reduce = tensor_model_parallel_all_reduce
    core = MaskProposer(
        drafter,
        target,
        config,
        select_operations(config.attention_backend, device),
        num_slots=vllm_config.scheduler_config.max_num_seqs,
        max_model_len=max_model_len,
        seed=vllm_config.model_config.seed,
        tells_logits=tells_logits,
        gather=tensor_model_parallel_all_gather if num_ranks > 1 else None,
    )
    if is_gpu(device) and not vllm_config.model_config.enforce_eager:
        core.reserve_for_graphs()
    weights, copied = sum(x.nbytes for x in drafter.parameters()), 0
    if packs_matrices(config, device.type) and num_ranks == 1 and dtype == torch.float:
        copied = pack_matrices(drafter, core.loop.parts)
    logger.info(
        "BudgetDraft memory: FlexDraft weights %.1f MiB, the target's output matrix "
        "packed %.1f MiB, drafts' distributions %.1f MiB, no draft cache",
        weights / 2**20,
        copied / 2**20,
        core.scratch_bytes / 2**20,
    )
    return core


def finish_core(core: MaskProposer, vllm_config: VllmConfig, num_kinds: int) -> None:
    """Lets mask tokens draft, now that the engine has its cache and is compiled.

    Args:
        num_kinds: see ``bind_to_target``.

    Raises:
        UnsupportedVllmError: they cannot read that cache.
    """
    bind_to_target(core, num_kinds)
    core.warm_up()
    if is_gpu(core.device) and not vllm_config.model_config.enforce_eager:
        is_alone = vllm_config.parallel_config.tensor_parallel_size == 1
        capture_graphs(core, CudaGraphCapture(), may_fail=is_alone)


def embedding_for(head: str, target: nn.Module) -> Tensor | None:
    """The target's embeddings [vocab_size, hidden_size], for a head that has none.

    The same memory, if one rank has it all; else every rank must call this, and gets a
    copy. None where they are no numbers, or the head's folder has its own.
    """
    if not StoredWeights(Path(head), WEIGHTS).lacks(EMBEDDING):
        return None
    for module in target.modules():
        if isinstance(module, ParallelLMHead):
            continue
        if isinstance(module, VocabParallelEmbedding):
            weight = getattr(module, "weight", None)
            if weight is None or not weight.is_floating_point():
                return None
            if module.tp_size > 1:
                weight = tensor_model_parallel_all_gather(weight, dim=0)
            return weight[: module.org_vocab_size].detach()
    return None


def _target_cost(vllm_config: VllmConfig) -> float:
    """Time of the target for one token, counted in tokens that the drafter could read.

    Of experts a token meets few, so that their number is no measure.
    """
    target = vllm_config.model_config
    drafter = read_config(vllm_config.speculative_config.settings.model)
    layers = target.get_total_num_hidden_layers()
    size = layers * target.get_hidden_size() ** 2
    size /= vllm_config.parallel_config.tensor_parallel_size
    cost: float = size / (drafter.num_hidden_layers * drafter.hidden_size**2)
    return cost


def capture_graphs(
    core: DraftProposer | MaskProposer, capture: Capture, *, may_fail: bool = True
) -> None:
    """Captures the drafts of every batch size, or says why they go on without.

    Args:
        may_fail: False where other ranks would wait for this one.
    """
    try:
        num_graphs = core.capture_graphs(capture)
    except Exception as error:
        if not may_fail:
            raise
        logger.warning(
            "BudgetDraft drafts without CUDA graphs, more slowly: capturing them "
            "failed with %s: %s",
            type(error).__name__,
            error,
        )
    else:
        logger.info("BudgetDraft captured %d CUDA graphs of its drafts", num_graphs)


def _log_memory(core: DraftProposer, shared_dtype: torch.dtype | None) -> None:
    """
    Args:
        shared_dtype: of the target's embeddings, if a head can use their memory.
    """
    drafter, dtype = core.drafter, core.cache.pool.keys.dtype
    weights = weight_bytes(
        drafter.config,
        dtype,
        drafter.is_packed,
        drafter.draft_ids,
        isinstance(drafter, FeatureDrafter)
        and drafter.shares_embedding
        and dtype == shared_dtype,
    )
    bill = core.plan.describe(weights=weights, scratch=core.scratch_bytes)
    logger.info("BudgetDraft memory: %s", bill)
