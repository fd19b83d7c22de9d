"""Drafting with no engine in sight: fixed slots, tensors in, tensors out."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vllm_budgetdraft.attention.backend import select_operations
from vllm_budgetdraft.attention.paged import PagedAttention
from vllm_budgetdraft.attention.prompt import PromptAttention
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.cache.page_pool import PagePool
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.drafter.configuration import head_dim
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.base import EvictionPolicy, all_positions
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
            prompt_scratch=config.scratch_tokens(max_model_len) * per_token,
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
        operations: ModuleType,
    ) -> None:
        self.drafter = drafter
        self.operations = operations
        self.policy = policy
        self.cache = cache
        self.prompt = prompt
        self.config = config
        self.num_drafts = config.num_speculative_tokens
        self._streams = config.draft_prefill == "streaming"
        self.device = cache.num_evicted.device
        # From the end of a context to each token fed; the last draft token is not.
        last = self.num_drafts - 1
        self._offsets = torch.arange(-FIRST_WIDTH, last, device=self.device)
        starts = torch.arange(cache.num_evicted.shape[0] + 1, device=self.device)
        self._query_starts = {width: starts * width for width in (FIRST_WIDTH, 1)}
        shape = (cache.num_evicted.shape[0], self.num_drafts)
        self._drafts = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._confidences = torch.zeros(shape, device=self.device)

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
            UnsupportedDrafterError, ConfigurationError: see ``load_drafter``,
                ``make_policy`` and ``select_operations``.
        """
        device = torch.device(device)
        operations = select_operations(config.attention_backend, device)
        drafter = load_drafter(
            config.model,
            max_positions=max_model_len + config.num_speculative_tokens,
            dtype=dtype,
            device=device,
        )
        policy = make_policy(config, operations)
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
            operations=operations,
        )
        prompt = PromptAttention(
            operations,
            max_tokens=config.scratch_tokens(max_model_len),
            num_heads=drafter.num_heads,
            observation_tokens=policy.observation_tokens,
            **shape,
        )
        return cls(drafter, policy, cache, prompt, config, operations)

    def start_request(self, slot: int) -> None:
        self.cache.start_request(slot)

    def release_request(self, slot: int) -> None:
        self.cache.release_request(slot)

    def release_all(self) -> None:
        self.cache.release_all()

    def ingest(self, slot: int, tokens: Tensor) -> None:
        """Reads a context into an empty slot.

        Args:
            tokens: [num_tokens] int64, the context less its last ``FIRST_WIDTH``
                tokens, which the next ``draft`` feeds. May be empty.
        """
        self.start_reading()
        for chunk in tokens.split(self.config.draft_prefill_chunk):
            self.read(chunk)
        self.finish_reading(slot)

    def start_reading(self) -> None:
        """Begins another context; of one that was not finished nothing is left."""
        self.prompt.restart()

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> None:
        """Reads the next tokens of a context.

        Args:
            tokens: [num_tokens] int64, at most ``draft_prefill_chunk``.
        """
        prompt = self.prompt
        if not len(tokens):
            return
        start = prompt.num_tokens
        positions = torch.arange(start, start + len(tokens), device=self.device)
        self.drafter(tokens, prompt.chunk(*self.drafter.rotary(positions)))
        if self._streams:
            prompt.keep(self._select())

    @torch.inference_mode()
    def finish_reading(self, slot: int) -> None:
        """Moves what the policy keeps of the context that was read into a slot."""
        prompt = self.prompt
        if prompt.num_tokens:
            states = prompt.keys.transpose(1, 2)
            kept = all_positions(states) if self._streams else self._select()
            self.cache.load_prompt(
                slot, prompt.keys, prompt.values, kept, prompt.num_tokens
            )

    def _select(self) -> Tensor:
        """Rows of the prompt buffer to keep, [num_layers, num_kv_heads, num_kept]."""
        prompt = self.prompt
        keys, queries = prompt.keys.transpose(1, 2), prompt.last_queries()
        return self.policy.select(keys, queries, self.config.kv_budget)

    @torch.inference_mode()
    def draft(
        self, slots: Tensor, tokens: Tensor, ends: Tensor, *, validate: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Drafts greedily, for every request at once.

        Args:
            slots: [B] int64, distinct.
            tokens: [B, FIRST_WIDTH] int64, the last tokens of each context.
            ends: [B] int64, context lengths, prompt and verified output together, at
                least ``FIRST_WIDTH``. A slot's cache must hold, or have evicted, all
                but the last ``FIRST_WIDTH`` of them.
            validate: whether the operations check what they are given, which waits for
                the device.

        Returns:
            [B, num_drafts] int64 drafts, and the drafter's probability of each, float32
            and not finite where its logits were not; valid until the next call.
        """
        cache, num_drafts = self.cache, self.num_drafts
        cache.make_room(slots, ends + (num_drafts - 1))
        positions = ends[:, None] + self._offsets
        indices = positions - cache.num_evicted[slots, None]
        cells = cache.page_table.cells(slots, indices, cache.page_size)
        cos, sin = self.drafter.rotary(positions)
        steps = zip(
            zip(_by_step(cos), _by_step(sin), strict=True),
            _by_step(cells),
            (indices[:, FIRST_WIDTH - 1 :] + 1).T.contiguous(),
            strict=True,
        )
        table = cache.page_table.pages[slots]
        attention = PagedAttention(
            self.operations, cache.pool, table, validate=validate
        )

        drafts, confidences = (
            self._drafts[: len(slots)],
            self._confidences[: len(slots)],
        )
        fed, width = tokens.flatten(), FIRST_WIDTH
        for step, (rotary, step_cells, lengths) in enumerate(steps):
            starts = self._query_starts[width][: len(slots) + 1]
            attend = attention.step(rotary, step_cells, lengths, starts, width)
            hidden = self.drafter(fed, attend)
            # The last token fed of each request.
            logits = self.drafter.logits(hidden[width - 1 :: width])
            fed, confidence = self.operations.greedy_pick(logits, validate=validate)
            drafts[:, step], confidences[:, step] = fed, confidence
            width = 1
        return drafts, confidences

    def warm_up(self) -> None:
        """Runs every operation once, on slot 0, which must be idle."""
        length = min(self.config.draft_prefill_chunk, self.prompt.max_tokens)
        length = max(length, FIRST_WIDTH)  # no context that drafts is shorter
        tokens = torch.zeros(length, dtype=torch.int64, device=self.device)
        slots = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.start_request(0)
        self.ingest(0, tokens[:-FIRST_WIDTH])
        self.draft(slots, slots.expand(1, FIRST_WIDTH), slots + length, validate=True)
        self.release_request(0)


def _by_step(x: Tensor) -> list[Tensor]:
    """[B, T, ...] of all tokens fed, by step: [B * FIRST_WIDTH, ...], then [B, ...]."""
    later = x[:, FIRST_WIDTH:].transpose(0, 1).contiguous()
    return [x[:, :FIRST_WIDTH].flatten(0, 1), *later]
