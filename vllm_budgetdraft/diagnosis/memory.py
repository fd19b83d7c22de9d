"""What a drafter would allocate, without loading it."""

import torch

from vllm_budgetdraft.config import BudgetDraftConfig, settle
from vllm_budgetdraft.drafter.configuration import read_drafter_config, trained_view
from vllm_budgetdraft.drafter.draft_vocabulary import read_draft_vocabulary
from vllm_budgetdraft.drafter.packing import weight_bytes
from vllm_budgetdraft.flexdraft.checkpoint import drafter_type
from vllm_budgetdraft.proposer.memory import (
    BATCH_TOKENS,
    MemoryPlan,
    packs_matrices,
    resolve_dtype,
)


def describe(
    config: BudgetDraftConfig,
    *,
    max_model_len: int,
    max_num_seqs: int,
    target_dtype: torch.dtype,
    device_type: str,
    vocab_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    is_v2: bool = False,
) -> str:
    """The line that the engine logs, but for what counts of attention take.

    Args:
        vocab_size: the target's; the drafter's own if None.
        batch_tokens: most tokens that a step of the target computes.
        is_v2: whether in vLLM's model runner V2, which is told logits.

    Raises:
        ConfigurationError, UnsupportedDrafterError: see ``read_drafter_config``,
            ``read_draft_vocabulary``, ``settle`` and ``MemoryPlan.of``.
    """
    if drafter_type(config) == "flexdraft":
        return "no draft cache: FlexDraft reads the target's own"
    drafter = read_drafter_config(config.model)
    draft_ids = read_draft_vocabulary(
        config.model, drafter, config.draft_vocabulary_size, vocab_size
    )
    drafter.vocab_size = vocab_size or drafter.vocab_size
    dtype = resolve_dtype(config, device_type, target_dtype)
    plan = MemoryPlan.of(
        settle(config, trained_view(drafter)),
        drafter,
        num_slots=max_num_seqs,
        max_model_len=max_model_len,
        dtype=dtype,
        batch_tokens=batch_tokens,
        tells_logits=is_v2,
    )
    is_packed = packs_matrices(config, device_type)
    return plan.describe(
        weights=weight_bytes(drafter, dtype, is_packed, draft_ids),
        scratch=plan.prompt_scratch + plan.distributions,
    )
