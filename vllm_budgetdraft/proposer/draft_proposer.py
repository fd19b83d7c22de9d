"""Drafting with no engine in sight: fixed slots, tensors in, tensors out."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_budgetdraft.attention.backend import select_operations
from vllm_budgetdraft.attention.paged import PagedAttention
from vllm_budgetdraft.attention.prompt import PromptAttention
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.cache.page_pool import PagePool
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.drafter.configuration import read_drafter_config, settle
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.base import EvictionPolicy
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.proposer.memory import MemoryPlan
from vllm_budgetdraft.proposer.prompt_reader import PromptReader

#: Tokens fed in the first step of a draft. After a full acceptance the cache lacks the
#: last draft token and the bonus token; otherwise it lacks the bonus token alone, and
#: the token before it is computed again, to the same result.
FIRST_WIDTH = 2
#: Most tokens of a request that ``paged_sparse_attention`` takes at once.
MAX_WIDTH = 32


class Drafts(NamedTuple):
    """What was drafted, valid until the next call.

    Attributes:
        tokens: [B, k] int64.
        confidences: [B, k] float32, the largest probability at each position; not
            finite where the drafter's logits were not.
        probabilities: [B, k, V] float32, what each token was drawn from; None where all
            were picked greedily.
    """

    tokens: Tensor
    confidences: Tensor
    probabilities: Tensor | None


class DraftProposer:
    """Reads prompts, keeps what the policy chooses, and drafts up to k tokens per call.

    Attributes:
        config: settled, see ``settle``.
        kv_budget: most prompt tokens that a request keeps.
        reader: of the one context that is being read, up to ``finish_reading``.
        max_drafts: k.
        max_append: most tokens of a request that one ``append`` takes.
    """

    def __init__(
        self,
        drafter: Drafter,
        policy: EvictionPolicy,
        cache: BudgetedCache,
        prompt: PromptAttention,
        config: BudgetDraftConfig,
        operations: ModuleType,
        max_model_len: int,
        seed: int,
    ) -> None:
        self.drafter = drafter
        self.operations = operations
        self.policy = policy
        self.cache = cache
        self.config = config
        self.max_model_len = max_model_len
        self.kv_budget = config.budget(max_model_len)
        self.max_drafts = config.num_speculative_tokens
        self.max_append = min(self.max_drafts + 1, MAX_WIDTH)
        self.reader = PromptReader(drafter, policy, prompt, config, self.kv_budget)
        self._is_relative = config.position_mode == "cache_relative"
        self.device = cache.num_evicted.device
        widths = range(-FIRST_WIDTH, max(self.max_drafts, self.max_append))
        self._offsets = torch.tensor(widths, device=self.device)
        num_slots = cache.num_evicted.shape[0]
        starts = torch.arange(num_slots + 1, device=self.device)
        self._query_starts = {width: starts * width for width in (FIRST_WIDTH, 1)}
        shape = (num_slots, self.max_drafts)
        self._drafts = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._confidences = torch.zeros(shape, device=self.device)
        self._probabilities: Tensor | None = None
        if config.draft_sample_method == "probabilistic":
            # Its own, for verification must not know the noise of what it verifies.
            self._generator = torch.Generator(self.device).manual_seed(seed)
            self._probabilities = torch.zeros(
                (*shape, drafter.config.vocab_size), device=self.device
            )
        self._page_mass: Tensor | None = None
        if policy.accumulates_attention:
            width = max(FIRST_WIDTH, self.max_append)
            self._page_mass = torch.zeros(
                (width * num_slots, drafter.num_heads, cache.pages_per_slot),
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
        seed: int = 0,
    ) -> "DraftProposer":
        """Loads the drafter and allocates everything that drafting will ever need.

        Args:
            num_slots: requests that can draft at once.
            max_model_len: longest context, prompt and output together.
            seed: of sampled drafts.

        Raises:
            UnsupportedDrafterError, ConfigurationError: see ``load_drafter``,
                ``settle``, ``MemoryPlan.of``, ``make_policy`` and
                ``select_operations``.
        """
        device = torch.device(device)
        operations = select_operations(config.attention_backend, device)
        drafter_config = read_drafter_config(config.model)
        config = settle(config, drafter_config, max_model_len)
        plan = MemoryPlan.of(
            config,
            drafter_config,
            num_slots=num_slots,
            max_model_len=max_model_len,
            dtype=dtype,
        )
        capacity = config.cache_capacity(max_model_len)
        scratch_tokens = plan.prompt_scratch // plan.bytes_per_token
        positions = max_model_len + config.num_speculative_tokens
        is_relative = config.position_mode == "cache_relative"
        drafter = load_drafter(
            config.model,
            max_positions=max(capacity, scratch_tokens) if is_relative else positions,
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
        cache = BudgetedCache(
            PagePool(num_pages=plan.num_pages, page_size=config.page_size, **shape),
            num_slots=num_slots,
            capacity=capacity,
            protected_tokens=policy.protected_tokens(config.budget(max_model_len)),
            max_growth=config.num_speculative_tokens + 1,
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
        return cls(
            drafter, policy, cache, prompt, config, operations, max_model_len, seed
        )

    @property
    def scratch_bytes(self) -> int:
        """Of prompts being read, counts of attention, and drafts' distributions."""
        others = (self._page_mass, self._probabilities)
        return self.reader.prompt.num_bytes + sum(
            x.nbytes for x in others if x is not None
        )

    def start_request(self, slot: int, kv_budget: int | None = None) -> None:
        """Gives a slot its pages.

        Args:
            kv_budget: of this request, at most the configured one, which is the
                default.

        Raises:
            PagePoolExhaustedError: too few pages are free.
        """
        budget = self.kv_budget if kv_budget is None else kv_budget
        protected = self.policy.protected_tokens(budget)
        self.cache.start_request(slot, self._capacity(kv_budget), protected)

    def has_room(self, kv_budget: int | None = None) -> bool:
        """Whether ``start_request`` would find the pages it needs."""
        return self.cache.pool.num_free * self.cache.page_size >= self._capacity(
            kv_budget
        )

    def _capacity(self, kv_budget: int | None) -> int:
        return self.config.cache_capacity(self.max_model_len, kv_budget)

    def release_request(self, slot: int) -> None:
        self.cache.release_request(slot)

    def release_all(self) -> None:
        self.cache.release_all()

    def ingest(self, slot: int, tokens: Tensor, kv_budget: int | None = None) -> None:
        """Reads a context into an empty slot.

        Args:
            tokens: [num_tokens] int64, the context less its last ``FIRST_WIDTH``
                tokens, which the next ``draft`` feeds. May be empty.
            kv_budget: as given to ``start_request``.
        """
        reader = self.reader
        reader.start(len(tokens), kv_budget)
        while unread := reader.unread(len(tokens)):
            chunk = unread[: self.config.draft_prefill_chunk]
            reader.read(tokens[chunk.start : chunk.stop])
        self.finish_reading(slot)

    @torch.inference_mode()
    def finish_reading(self, slot: int) -> None:
        """Moves what the policy keeps of the context that was read into a slot."""
        prompt = self.reader.prompt
        if prompt.num_held:
            self.cache.load_prompt(
                slot,
                prompt.keys,
                prompt.values,
                self.reader.kept(),
                self.reader.num_seen,
                prompt.attention,
            )

    @torch.inference_mode()
    def append(
        self, slots: Tensor, tokens: Tensor, starts: Tensor, *, validate: bool = False
    ) -> None:
        """Feeds tokens that came without being drafted, of every request as many.

        Args:
            slots: [B] int64, distinct.
            tokens: [B, width] int64, width at most ``max_append``.
            starts: [B] int64, position of the first. A slot's cache must hold, or have
                evicted, all before it.
        """
        width = tokens.shape[1]
        assert width <= self.max_append, (width, self.max_append)
        self.cache.make_room(slots, starts + width)
        offsets = self._offsets[FIRST_WIDTH : FIRST_WIDTH + width]
        rotary, cells, lengths = self._places(slots, starts[:, None] + offsets)
        attention = self._attention(slots, validate)
        query_starts = width * self._query_starts[1][: len(slots) + 1]
        cos, sin = (x.flatten(0, 1) for x in rotary)
        self.drafter(
            tokens.flatten(),
            attention.step(
                (cos, sin), cells.flatten(), lengths[:, -1], query_starts, width
            ),
        )
        self._count(slots, attention)

    @torch.inference_mode()
    def draft(
        self,
        slots: Tensor,
        tokens: Tensor,
        ends: Tensor,
        num_drafts: int | None = None,
        temperatures: Tensor | None = None,
        *,
        validate: bool = False,
    ) -> Drafts:
        """Drafts for every request at once, greedily or from the drafter's softmax.

        Args:
            slots: [B] int64, distinct.
            tokens: [B, FIRST_WIDTH] int64, the last tokens of each context.
            ends: [B] int64, context lengths, prompt and verified output together, at
                least ``FIRST_WIDTH``. A slot's cache must hold, or have evicted, all
                but the last ``FIRST_WIDTH`` of them.
            num_drafts: k of this call, at least 1; ``max_drafts`` if None.
            temperatures: [B] float32, 0 where the likeliest token is to be drafted, and
                has all the probability; None for all of them. Only where
                ``draft_sample_method`` is "probabilistic".
            validate: whether the operations check what they are given, which waits for
                the device.
        """
        cache, batch = self.cache, len(slots)
        num_drafts = num_drafts or self.max_drafts
        cache.make_room(slots, ends + (num_drafts - 1))
        # From the end of a context to each token fed; the last draft token is not.
        positions = ends[:, None] + self._offsets[: FIRST_WIDTH + num_drafts - 1]
        (cos, sin), cells, lengths = self._places(slots, positions)
        steps = zip(
            zip(_by_step(cos), _by_step(sin), strict=True),
            _by_step(cells),
            lengths[:, FIRST_WIDTH - 1 :].T.contiguous(),
            strict=True,
        )
        attention = self._attention(slots, validate)
        drafts = self._drafts[:batch, :num_drafts]
        confidences = self._confidences[:batch, :num_drafts]
        probabilities: Tensor | None = None
        if temperatures is not None:
            assert self._probabilities is not None
            probabilities = self._probabilities[:batch, :num_drafts]
            seeds = torch.randint(
                2**62,
                (num_drafts, batch),
                generator=self._generator,
                device=self.device,
            )
        fed, width = tokens.flatten(), FIRST_WIDTH
        for step, (rotary, step_cells, step_lengths) in enumerate(steps):
            starts = self._query_starts[width][: batch + 1]
            attend = attention.step(rotary, step_cells, step_lengths, starts, width)
            hidden = self.drafter(fed, attend)
            # The last token fed of each request.
            logits = self.drafter.logits(hidden[width - 1 :: width])
            if probabilities is None:
                fed, confidence = self.operations.greedy_pick(logits, validate=validate)
            else:
                fed, confidence, probabilities[:, step] = self.operations.gumbel_pick(
                    logits, temperatures, seeds[step], validate=validate
                )
            drafts[:, step], confidences[:, step] = fed, confidence
            width = 1
        self._count(slots, attention)
        return Drafts(drafts, confidences, probabilities)

    def _places(
        self, slots: Tensor, positions: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Of positions [B, T]: cos and sin [B, T, D], cells, and lengths with them."""
        cache = self.cache
        indices = positions - cache.num_evicted[slots, None]
        rotary = self.drafter.rotary(indices if self._is_relative else positions)
        cells = cache.page_table.cells(slots, indices, cache.page_size)
        return rotary, cells, indices + 1

    def _attention(self, slots: Tensor, validate: bool) -> PagedAttention:
        return PagedAttention(
            self.operations,
            self.cache.pool,
            self.cache.page_table.pages[slots],
            key_rotary=self.drafter.rotary_rows if self._is_relative else None,
            page_mass=self._page_mass,
            validate=validate,
        )

    def _count(self, slots: Tensor, attention: PagedAttention) -> None:
        if attention.attention is not None:
            self.cache.add_attention(slots, attention.attention)

    def warm_up(self) -> None:
        """Runs every operation once, on slot 0, which must be idle."""
        length = min(self.config.draft_prefill_chunk, self.reader.prompt.max_tokens)
        length = max(length, FIRST_WIDTH)  # no context that drafts is shorter
        tokens = torch.zeros(length, dtype=torch.int64, device=self.device)
        slots = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.start_request(0)
        self.ingest(0, tokens[:-FIRST_WIDTH])
        first = slots.expand(1, FIRST_WIDTH)
        self.append(slots, first[:, :1], slots + length - FIRST_WIDTH, validate=True)
        temperatures: list[Tensor | None] = [None]
        if self._probabilities is not None:
            temperatures.append(torch.ones(1, device=self.device))
        for each in temperatures:
            self.draft(slots, first, slots + length, None, each, validate=True)
        self.release_request(0)


def _by_step(x: Tensor) -> list[Tensor]:
    """[B, T, ...] of all tokens fed, by step: [B * FIRST_WIDTH, ...], then [B, ...]."""
    later = x[:, FIRST_WIDTH:].transpose(0, 1).contiguous()
    return [x[:, :FIRST_WIDTH].flatten(0, 1), *later]
