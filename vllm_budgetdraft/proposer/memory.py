"""The memory that a proposer allocates at start-up, and no other later."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.config import BudgetDraftConfig, SettledConfig
from vllm_budgetdraft.drafter.configuration import check_native_range, head_dim
from vllm_budgetdraft.drafter.packing import can_pack
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.proposer.drawn_logits import logits_dtype

MIB, GIB = 2**20, 2**30
#: Of a step, where no engine says.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in bytes.

    Attributes:
        bytes_per_token: keys and values of one token, all layers.
        capacity: tokens that the draft cache of one request holds.
        cache_per_request: draft cache of one request, whatever its context.
        full_cache_per_request: the same with every token of ``max_model_len`` kept.
        num_pages: of the pool.
        pass_tokens: most tokens of prompts that one pass of the drafter reads.
        cache: the whole pool, and its spare page.
        snapshots: of it, what snapshots have beside what requests leave.
        prompt_scratch: keys and values of prompts being read: the longest, and as many
            tokens as one pass reads.
        distributions: what drafts are drawn from.
    """

    bytes_per_token: int
    capacity: int
    cache_per_request: int
    full_cache_per_request: int
    num_pages: int
    pass_tokens: int
    cache: int
    snapshots: int
    prompt_scratch: int
    distributions: int

    @classmethod
    def of(
        cls,
        config: SettledConfig,
        drafter: PretrainedConfig,
        *,
        num_slots: int,
        max_model_len: int,
        dtype: torch.dtype,
        batch_tokens: int = BATCH_TOKENS,
        tells_logits: bool = False,
    ) -> "MemoryPlan":
        """
        Args:
            num_slots: requests that draft at once, given the memory.
            batch_tokens: most tokens that a step of the target computes.
            tells_logits: see ``build_proposer``.

        Raises:
            ConfigurationError: pool_memory_gib does not hold one request; or see
                ``check_native_range``.
        """
        check_native_range(config, drafter, max_model_len)
        heads = drafter.num_hidden_layers * drafter.num_key_value_heads
        per_token = 2 * heads * head_dim(drafter) * dtype.itemsize
        capacity = config.cache_capacity(max_model_len)
        num_pages = num_slots * capacity // config.page_size
        page = config.page_size * per_token
        if config.pool_memory_gib is not None:
            limit = int(config.pool_memory_gib * GIB) // page - 1
            num_pages = min(num_pages, limit)
            if num_pages * config.page_size < capacity:
                raise ConfigurationError(
                    f"pool_memory_gib={config.pool_memory_gib} is below the "
                    f"{(capacity * per_token + page) / GIB:.3g} GiB of one request's "
                    "draft cache and a spare page; raise it, or lower "
                    f"kv_budget={config.kv_budget} or "
                    f"recent_window={config.recent_window}"
                )
        snapshot_pages = int((config.snapshot_memory_gib or 0) * GIB) // page
        num_pages += snapshot_pages
        held = config.held_tokens(max_model_len, drafter.max_position_embeddings)
        # One that is read over many steps must leave room for those that begin and end
        # in one.
        pass_tokens = config.pass_tokens(batch_tokens)
        scratch = min(held + pass_tokens, num_slots * held)
        is_drawn = config.draft_sample_method == "probabilistic"
        number = drafter.vocab_size * config.num_speculative_tokens
        distributions = 4 * num_slots * number
        if tells_logits:  # one more, of the spare slot
            distributions = logits_dtype(dtype).itemsize * (num_slots + 1) * number
        return cls(
            bytes_per_token=per_token,
            capacity=capacity,
            cache_per_request=capacity * per_token,
            full_cache_per_request=max_model_len * per_token,
            num_pages=num_pages,
            pass_tokens=pass_tokens,
            cache=(num_pages + 1) * page,
            snapshots=snapshot_pages * page,
            prompt_scratch=scratch * per_token,
            distributions=is_drawn * distributions,
        )

    def describe(self, *, weights: int, scratch: int) -> str:
        """The bill, for people.

        Args:
            weights: bytes of the drafter.
            scratch: bytes of all buffers, ``distributions`` among them.
        """
        requests, kept = self.cache - self.snapshots, ""
        if self.snapshots:
            kept = f"; snapshots {self.snapshots / MIB:.1f} MiB"
        return (
            f"drafter weights {weights / MIB:.1f} MiB, draft cache "
            f"{self.cache / MIB:.1f} MiB ({requests // self.cache_per_request} "
            f"requests x {self.capacity} tokens, {self.cache_per_request / 1024:.1f} "
            "KiB each; the drafter's full cache would take "
            f"{self.full_cache_per_request / 1024:.1f} KiB each{kept}), scratch "
            f"{scratch / MIB:.1f} MiB, of which distributions of drafts "
            f"{self.distributions / MIB:.1f} MiB (draft_sample_method)"
        )


def resolve_dtype(
    config: BudgetDraftConfig, device_type: str, target_dtype: torch.dtype
) -> torch.dtype:
    """What ``draft_dtype`` means on a device."""
    if config.draft_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.draft_dtype)
        return dtype
    return target_dtype if is_gpu(torch.device(device_type)) else torch.float32


def packs_matrices(config: BudgetDraftConfig, device_type: str) -> bool:
    """Whether the drafter's matrices are packed, see ``pack_matrices``."""
    on_cpu = not is_gpu(torch.device(device_type))
    return on_cpu and config.draft_dtype == "auto" and can_pack()
