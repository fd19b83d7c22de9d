"""A ``DraftProposer`` from a folder and settings: all that drafting allocates."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vllm_budgetdraft.attention.backend import select_operations
from vllm_budgetdraft.attention.prompt import PromptAttention
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.cache.page_pool import PagePool
from vllm_budgetdraft.config import BudgetDraftConfig, settle
from vllm_budgetdraft.drafter.configuration import trained_view
from vllm_budgetdraft.drafter.feature_checkpoint import is_feature_drafter
from vllm_budgetdraft.drafter.folder import load_for_drafting, read_config
from vllm_budgetdraft.drafter.packing import pack_matrices
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.memory import BATCH_TOKENS, MemoryPlan, packs_matrices


def build_proposer(
    config: BudgetDraftConfig,
    *,
    num_slots: int,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device | str,
    vocab_size: int | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    target_cost: float = 1.0,
    tells_logits: bool = False,
    embedding: Tensor | None = None,
) -> DraftProposer:
    """Loads the drafter and allocates everything that drafting will ever need.

    Args:
        num_slots: requests that can draft at once.
        max_model_len: longest context, prompt and output together.
        vocab_size: the target's; the drafter's own if None.
        seed: of sampled drafts.
        batch_tokens: most tokens that a step of the target computes.
        target_cost: of a token, in those that the drafter reads in that time.
        tells_logits: whether what drafts are drawn from is told as logits by slot,
            see ``drawn_logits``, and not as probabilities by row.
        embedding: the target's, [vocab_size, hidden_size], for a drafter that
            shares it.

    Raises:
        UnsupportedDrafterError, ConfigurationError: see ``load_for_drafting``,
            ``settle``, ``MemoryPlan.of``, ``make_policy`` and
            ``select_operations``.
    """
    device = torch.device(device)
    operations = select_operations(config.attention_backend, device)
    drafter_config = read_config(config.model)
    drafter_config.vocab_size = vocab_size or drafter_config.vocab_size
    kind: Literal["decoder", "eagle3"] = "decoder"
    if is_feature_drafter(config.model):
        kind = "eagle3"
    settled = settle(config, trained_view(drafter_config), kind)
    plan = MemoryPlan.of(
        settled,
        drafter_config,
        num_slots=num_slots,
        max_model_len=max_model_len,
        dtype=dtype,
        batch_tokens=batch_tokens,
        tells_logits=tells_logits,
    )
    capacity = settled.cache_capacity(max_model_len)
    scratch_tokens = plan.prompt_scratch // plan.bytes_per_token
    positions = max_model_len + settled.num_speculative_tokens
    is_relative = settled.position_mode == "cache_relative"
    if is_relative:
        native = drafter_config.max_position_embeddings
        positions = max(capacity, settled.held_tokens(max_model_len, native))
    drafter = load_for_drafting(
        config.model,
        draft_vocabulary_size=config.draft_vocabulary_size,
        max_positions=positions,
        dtype=dtype,
        device=device,
        vocab_size=vocab_size,
        embedding=embedding,
    )
    if packs_matrices(settled, device.type):
        pack_matrices(drafter)
    else:
        drafter.multiply_by(partial(operations.linear, validate=False))
    policy = make_policy(settled, operations)
    shape = {
        "num_layers": drafter.num_layers,
        "num_kv_heads": drafter.num_kv_heads,
        "head_dim": drafter.head_dim,
        "dtype": dtype,
        "device": device,
    }
    cache = BudgetedCache(
        PagePool(num_pages=plan.num_pages, page_size=settled.page_size, **shape),
        num_slots=num_slots,
        capacity=capacity,
        protected_tokens=policy.protected_tokens(settled.budget(max_model_len)),
        max_growth=settled.num_speculative_tokens + 1,
        evicts_by_attention=policy.accumulates_attention,
        operations=operations,
    )
    prompt = PromptAttention(
        operations,
        max_tokens=scratch_tokens,
        num_heads=drafter.num_heads,
        observation_tokens=policy.observation_tokens,
        accumulates_attention=policy.accumulates_attention,
        key_rotary=drafter.rotary_rows if is_relative else None,
        **shape,
    )
    step_tokens = int(batch_tokens * max(target_cost, 1.0))
    return DraftProposer(
        drafter,
        policy,
        cache,
        prompt,
        settled,
        operations,
        max_model_len,
        seed,
        plan,
        settled.max_step_tokens or step_tokens,
        tells_logits,
    )
