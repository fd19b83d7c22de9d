"""What a drafter would allocate, without loading it."""

from typing import Literal

import torch

from vllm_budgetdraft.config import BudgetDraftConfig, settle
from vllm_budgetdraft.drafter.configuration import trained_view
from vllm_budgetdraft.drafter.draft_vocabulary import read_draft_vocabulary
from vllm_budgetdraft.drafter.feature_checkpoint import (
    EMBEDDING,
    check_feature_weights,
    is_feature_drafter,
)
from vllm_budgetdraft.drafter.folder import read_config
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
        ConfigurationError, UnsupportedDrafterError: see ``read_config``,
            ``read_draft_vocabulary``, ``settle`` and ``MemoryPlan.of``.
    """
    if drafter_type(config) == "flexdraft":
        return "no draft cache: FlexDraft reads the target's own"
    dtype = resolve_dtype(config, device_type, target_dtype)
    drafter, draft_ids, shares_embedding = read_config(config.model), None, False
    kind: Literal["decoder", "eagle3"] = "decoder"
    if is_feature_drafter(config.model):
        kind = "eagle3"
        stored = check_feature_weights(config.model, drafter, has_embedding=True)
        shares_embedding = stored.lacks(EMBEDDING) and dtype == target_dtype
    else:
        draft_ids = read_draft_vocabulary(
            config.model, drafter, config.draft_vocabulary_size, vocab_size
        )
    drafter.vocab_size = vocab_size or drafter.vocab_size
    plan = MemoryPlan.of(
        settle(config, trained_view(drafter), kind),
        drafter,
        num_slots=max_num_seqs,
        max_model_len=max_model_len,
        dtype=dtype,
        batch_tokens=batch_tokens,
        tells_logits=is_v2,
    )
    is_packed = packs_matrices(config, device_type)
    return plan.describe(
        weights=weight_bytes(drafter, dtype, is_packed, draft_ids, shares_embedding),
        scratch=plan.prompt_scratch + plan.distributions,
    )
