"""Drafting with no engine in sight: fixed slots, tensors in, tensors out."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vllm_budgetdraft.attention.paged import PagedAttention
from vllm_budgetdraft.attention.prompt import PromptAttention
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.cache.page_pool import PagePool
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.drafter.configuration import head_dim
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.base import EvictionPolicy, take_positions
from vllm_budgetdraft.eviction.catalogue import make_policy

#: Tokens fed in the first step of a draft. After a full acceptance the cache lacks the
#: last draft token and the bonus token; otherwise it lacks the bonus token alone, and
#: the token before it is computed again, to the same result.
FIRST_WIDTH = 2


@dataclass(frozen=True)
class MemoryPlan:
    """What the proposer allocates, in bytes; all of it at start-up.

    Attributes:
        bytes_per_token: keys and values of one token, all layers.
        cache_per_request: draft cache of one request, whatever its context.
        full_cache_per_request: the same with every token of ``max_model_len`` kept.
        cache: the whole pool, ``num_slots`` times ``cache_per_request``.
        prompt_scratch: keys and values of the one prompt being read.
    """

    bytes_per_token: int
    cache_per_request: int
    full_cache_per_request: int
    cache: int
    prompt_scratch: int

    @classmethod
    def of(
        cls,
        config: BudgetDraftConfig,
        drafter: PretrainedConfig,
        *,
        num_slots: int,
        max_model_len: int,
        dtype: torch.dtype,
    ) -> "MemoryPlan":
        heads = drafter.num_hidden_layers * drafter.num_key_value_heads
        per_token = 2 * heads * head_dim(drafter) * dtype.itemsize
        per_request = config.cache_capacity(max_model_len) * per_token
        return cls(
            bytes_per_token=per_token,
            cache_per_request=per_request,
            full_cache_per_request=max_model_len * per_token,
            cache=num_slots * per_request,
            prompt_scratch=max_model_len * per_token,
        )


def resolve_dtype(
    config: BudgetDraftConfig, device_type: str, target_dtype: torch.dtype
) -> torch.dtype:
    """What ``draft_dtype`` means on a device."""
    if config.draft_dtype != "auto":
        return getattr(torch, config.draft_dtype)
    return torch.float32 if device_type == "cpu" else target_dtype


class DraftProposer:
    """Reads prompts, keeps what the policy chooses, and drafts k tokens per call."""

    def __init__(
        self,
        drafter: Drafter,
        policy: EvictionPolicy,
        cache: BudgetedCache,
        prompt: PromptAttention,
        config: BudgetDraftConfig,
    ) -> None:
        self.drafter = drafter
        self.policy = policy
        self.cache = cache
        self.prompt = prompt
        self.config = config
        self.num_drafts = config.num_speculative_tokens
        self.device = cache.num_evicted.device
        # From the end of a context to each token fed; the last draft token is not.
        last = self.num_drafts - 1
        self._offsets = torch.arange(-FIRST_WIDTH, last, device=self.device)
        self._widths = [FIRST_WIDTH, *[1] * last]  # of each step
        self._drafts = torch.zeros(
            (cache.num_evicted.shape[0], self.num_drafts),
            dtype=torch.int64,
            device=self.device,
        )

    @classmethod
    def build(
        cls,
        config: BudgetDraftConfig,
        *,
        num_slots: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "DraftProposer":
        """Loads the drafter and allocates everything that drafting will ever need.

        Args:
            num_slots: requests that can draft at once.
            max_model_len: longest context, prompt and output together.

        Raises:
            UnsupportedDrafterError, ConfigurationError: see ``load_drafter`` and
                ``make_policy``.
        """
        device = torch.device(device)
        drafter = load_drafter(
            config.model,
            max_positions=max_model_len + config.num_speculative_tokens,
            dtype=dtype,
            device=device,
        )
        policy = make_policy(config)
        shape = {
            "num_layers": drafter.num_layers,
            "num_kv_heads": drafter.num_kv_heads,
            "head_dim": drafter.head_dim,
            "dtype": dtype,
            "device": device,
        }
        capacity = config.cache_capacity(max_model_len)
        pool = PagePool(
            num_pages=num_slots * capacity // config.page_size,
            page_size=config.page_size,
            **shape,
        )
        cache = BudgetedCache(
            pool,
            num_slots=num_slots,
            capacity=capacity,
            protected_tokens=policy.protected_tokens(config.kv_budget),
            max_growth=config.num_speculative_tokens + 1,
        )
        prompt = PromptAttention(
            max_tokens=max_model_len,
            observation_tokens=policy.observation_tokens,
            **shape,
        )
        return cls(drafter, policy, cache, prompt, config)

    def start_request(self, slot: int) -> None:
        self.cache.start_request(slot)

    def release_request(self, slot: int) -> None:
        self.cache.release_request(slot)

    def release_all(self) -> None:
        self.cache.release_all()

    @torch.inference_mode()
    def ingest(self, slot: int, tokens: Tensor) -> None:
        """Reads a context into an empty slot.

        Args:
            tokens: [num_tokens] int64, the context less its last ``FIRST_WIDTH``
                tokens, which the next ``draft`` feeds. May be empty.
        """
        if not len(tokens):
            return
        prompt = self.prompt
        prompt.restart()
        for chunk in tokens.split(self.config.draft_prefill_chunk):
            start = prompt.num_tokens
            positions = torch.arange(start, start + len(chunk), device=self.device)
            self.drafter(chunk[None], self.drafter.rotary(positions[None]), prompt)
            prompt.advance(len(chunk))
        keys = prompt.keys[:, : len(tokens)].transpose(1, 2)
        values = prompt.values[:, : len(tokens)].transpose(1, 2)
        kept = self.policy.select(keys, prompt.last_queries(), self.config.kv_budget)
        self.cache.load_prompt(
            slot,
            take_positions(keys, kept).transpose(1, 2),
            take_positions(values, kept).transpose(1, 2),
            seen=len(tokens),
        )

    @torch.inference_mode()
    def draft(self, slots: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
        """Drafts greedily, for every request at once.

        Args:
            slots: [B] int64, distinct.
            tokens: [B, FIRST_WIDTH] int64, the last tokens of each context.
            ends: [B] int64, context lengths, prompt and verified output together, at
                least ``FIRST_WIDTH``. A slot's cache must hold, or have evicted, all
                but the last ``FIRST_WIDTH`` of them.

        Returns:
            [B, num_drafts] int64, valid until the next call.
        """
        cache, num_drafts = self.cache, self.num_drafts
        cache.make_room(slots, ends + (num_drafts - 1))
        positions = ends[:, None] + self._offsets
        indices = positions - cache.num_evicted[slots, None]
        cells = cache.page_table.cells(slots, indices, cache.page_size)
        lengths = indices + 1
        cos, sin = (
            x.split(self._widths, dim=1) for x in self.drafter.rotary(positions)
        )
        steps = zip(
            zip(cos, sin, strict=True),
            cells.split(self._widths, dim=1),
            lengths.split(self._widths, dim=1),
            strict=True,
        )
        attention = PagedAttention(cache.pool, cache.page_table.pages[slots])

        drafts = self._drafts[: len(slots)]
        for step, (rotary, step_cells, step_lengths) in enumerate(steps):
            attend = attention.step(step_cells, step_lengths)
            hidden = self.drafter(tokens, rotary, attend)
            token = self.drafter.logits(hidden[:, -1]).argmax(-1)
            drafts[:, step] = token
            tokens = token[:, None]
        return drafts

    def warm_up(self) -> None:
        """Runs every operation once, on slot 0, which must be idle."""
        length = min(self.config.draft_prefill_chunk, self.prompt.keys.shape[1])
        length = max(length, FIRST_WIDTH)  # no context that drafts is shorter
        tokens = torch.zeros(length, dtype=torch.int64, device=self.device)
        slots = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.start_request(0)
        self.ingest(0, tokens[:-FIRST_WIDTH])
        self.draft(slots, slots.expand(1, FIRST_WIDTH), slots + length)
        self.release_request(0)
