"""Drafting with no engine in sight: fixed slots, tensors in, tensors out."""

from collections.abc import Collection, Hashable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from vllm_budgetdraft.attention.paged import MAX_WIDTH
from vllm_budgetdraft.attention.prompt import PromptAttention
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.base import EvictionPolicy
from vllm_budgetdraft.proposer.draft_calls import DraftCalls
from vllm_budgetdraft.proposer.draft_graphs import Capture
from vllm_budgetdraft.proposer.draft_loop import (
    FIRST_WIDTH,
    DraftInputs,
    DraftLoop,
    Fed,
)
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.memory import MemoryPlan
from vllm_budgetdraft.proposer.picking import Drafts
from vllm_budgetdraft.proposer.prompt_reader import PromptReader, TokensOf
from vllm_budgetdraft.proposer.reading import Begun, Mark
from vllm_budgetdraft.proposer.snapshots import Match, SnapshotStore, States

#: A beginning that contexts share is kept for others if it has as many tokens or more.
MIN_SHARED_TOKENS = 64


class DraftProposer:
    """Reads prompts, keeps what the policy chooses, and drafts up to k tokens per call.

    Attributes:
        kv_budget: most prompt tokens that a request keeps.
        reader: of contexts that are being read.
        step_tokens: most tokens of them that one step of an engine is to read.
        plan: what was allocated.
        snapshots: of contexts that are over; None if none are kept.
        max_drafts: k.
        max_append: most tokens of a request that one ``append`` takes.
        reads_features: whether the drafter is fed what the target thought.
        first_width: tokens of a request that ``draft`` is fed.
        drawn_logits: what drafts are drawn from, if it is told as logits.
    """

    def __init__(
        self,
        drafter: Drafter,
        policy: EvictionPolicy,
        cache: BudgetedCache,
        prompt: PromptAttention,
        config: SettledConfig,
        operations: ModuleType,
        max_model_len: int,
        seed: int,
        plan: MemoryPlan,
        step_tokens: int,
        tells_logits: bool,
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
        self.reads_features = isinstance(drafter, FeatureDrafter)
        # What the target verified in the last step, and its own token after it.
        self.first_width = self.max_append if self.reads_features else FIRST_WIDTH
        self.plan = plan
        self.snapshots: SnapshotStore | None = None
        if config.snapshot_memory_gib != 0:
            self.snapshots = SnapshotStore(cache, lag=int(self.reads_features))
        self.step_tokens = step_tokens
        self.reader = PromptReader(
            drafter,
            policy,
            prompt,
            cache,
            config,
            kv_budget=self.kv_budget,
            pass_tokens=plan.pass_tokens,
        )
        self.device = cache.num_evicted.device
        draws = config.draft_sample_method == "probabilistic"
        self.drawn_logits: DrawnLogits | None = None
        if draws and tells_logits:
            self.drawn_logits = DrawnLogits(
                cache.num_slots,
                self.max_drafts,
                drafter.config.vocab_size,
                cache.pool.keys.dtype,
                self.device,
                drafter.draft_ids,
            )
        self._loop = DraftLoop(
            drafter,
            cache,
            operations,
            is_relative=config.position_mode == "cache_relative",
            max_drafts=self.max_drafts,
            max_width=self.max_append,
            draws=draws,
            drawn_logits=self.drawn_logits,
            counts_attention=policy.accumulates_attention,
        )
        self._calls = DraftCalls(self._loop, config, self.device, seed)

    @property
    def num_graphs(self) -> int:
        """Graphs that drafts replay; 0 where they run eagerly."""
        return self._calls.num_graphs

    @property
    def scratch_bytes(self) -> int:
        """Of prompts being read, counts of attention, and drafts' distributions."""
        return self.reader.prompt.num_bytes + self._loop.num_bytes

    def start_request(self, slot: int, kv_budget: int | None = None) -> None:
        """Gives a slot its pages.

        Args:
            kv_budget: of this request, at most the configured one, which is the
                default.

        Raises:
            PagePoolExhaustedError: too few pages are free.
        """
        capacity, protected = self._sizes(kv_budget)
        if self.snapshots is not None:
            self.snapshots.make_room(capacity // self.cache.page_size)
        self.cache.start_request(slot, capacity, protected)

    def start_reading(
        self,
        slot: int,
        num_tokens: int,
        kv_budget: int | None = None,
        mark: Mark | None = None,
    ) -> None:
        """Gives a slot its pages, and has ``read`` fill them.

        Args:
            num_tokens: of its context, less what the first ``draft`` feeds.
            kv_budget: see ``start_request``.
            mark: see ``mark``.

        Raises:
            PagePoolExhaustedError: too few pages are free.
        """
        self.start_request(slot, kv_budget)
        self._read_from(slot, num_tokens, kv_budget, Begun(), mark)

    def go_on_reading(
        self,
        slot: int,
        num_tokens: int,
        kv_budget: int | None,
        match: Match,
        mark: Mark | None = None,
    ) -> bool:
        """``start_reading`` after what a snapshot knows, if there is room.

        Args:
            match: of ``snapshots``, with the beginning of the context.

        Returns:
            Whether the slot has begun.
        """
        assert self.snapshots is not None
        begun = Begun(match.num_seen, match.num_held)
        budget = min(kv_budget or self.kv_budget, self.kv_budget)
        if not (
            self.reader.can_begin_with(begun, num_tokens, budget)
            and self.snapshots.take(slot, match, *self._sizes(kv_budget))
        ):
            return False
        self._read_from(slot, num_tokens, kv_budget, begun, mark)
        return True

    def _read_from(
        self,
        slot: int,
        num_tokens: int,
        kv_budget: int | None,
        begun: Begun,
        mark: Mark | None,
    ) -> None:
        try:
            self.reader.start(slot, num_tokens, kv_budget, begun, mark)
        except Exception:
            self.release_request(slot)
            raise

    def mark(
        self, scope: Hashable, tokens: np.ndarray, at: int, num_known: int
    ) -> Mark | None:
        """Has a beginning that contexts share be kept when it is read.

        Args:
            tokens: of the context.
            at: tokens that it shares with another one, as far as is known.
            num_known: of them, those that a snapshot has.

        Returns:
            None where a snapshot would spare less than it costs.
        """
        store = self.snapshots
        worth_it = at - num_known >= MIN_SHARED_TOKENS and at < len(tokens)
        if store is None or not worth_it:
            return None
        shared = tokens[:at].copy()

        def keep(states: States, rows: Tensor) -> None:
            store.keep_rows(scope, shared, states, rows)

        return Mark(at, keep)

    def has_room(self, kv_budget: int | None = None) -> bool:
        """Whether ``start_request`` would find the pages it needs."""
        return self.num_free_pages * self.cache.page_size >= self._capacity(kv_budget)

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds, including pages of snapshots."""
        kept = 0 if self.snapshots is None else self.snapshots.num_pages
        return self.cache.pool.num_free + kept

    def _sizes(self, kv_budget: int | None) -> tuple[int, int]:
        """Of a request's cache: its capacity, and tokens that are never evicted."""
        budget = min(kv_budget or self.kv_budget, self.kv_budget)
        return self._capacity(kv_budget), self.policy.protected_tokens(budget)

    def _capacity(self, kv_budget: int | None) -> int:
        return self.config.cache_capacity(self.max_model_len, kv_budget)

    def release_request(self, slot: int) -> None:
        self.reader.stop(slot)
        self.cache.release_request(slot)

    def release_all(self) -> None:
        self.reader.stop_all()
        self.cache.release_all()
        if self.snapshots is not None:
            self.snapshots.forget_all()

    def ingest(self, slot: int, tokens: Tensor, kv_budget: int | None = None) -> None:
        """Reads a context into an empty slot.

        Args:
            tokens: [num_tokens] int64, the context less its last ``FIRST_WIDTH``
                tokens, which the next ``draft`` feeds. May be empty.
            kv_budget: as given to ``start_request``.
        """
        self.reader.start(slot, len(tokens), kv_budget)

        def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
            ((_, piece),) = pieces
            return tokens[piece.start : piece.stop]

        self.reader.read([slot], tokens_of, limit=len(tokens))

    def read(
        self, slots: Collection[int], tokens_of: TokensOf, limit: int
    ) -> dict[int, Exception]:
        """See ``PromptReader.read_each``."""
        return self.reader.read_each(slots, tokens_of, limit)

    @torch.inference_mode()
    def append(
        self,
        slots: Tensor,
        tokens: Tensor,
        starts: Tensor,
        features: Tensor | None = None,
        *,
        validate: bool = False,
    ) -> None:
        """Feeds tokens that came without being drafted, of every request as many.

        Args:
            slots: [B] int64, distinct.
            tokens: [B, width] int64, width at most ``max_append``.
            starts: [B] int64, position of the first. A slot's cache must hold, or have
                evicted, all before it.
            features: [B, width, hidden_size], of each token, for a drafter that reads
                them.
        """
        assert tokens.shape[1] <= self.max_append, (tokens.shape, self.max_append)
        self._loop.append(slots, tokens, starts, features, validate=validate)

    @torch.inference_mode()
    def draft(
        self,
        slots: Tensor,
        tokens: Tensor,
        ends: Tensor,
        num_drafts: int | None = None,
        temperatures: Tensor | None = None,
        top_k: Tensor | None = None,
        fed: Fed | None = None,
        *,
        validate: bool = False,
    ) -> Drafts:
        """Drafts for every request at once, greedily or from the drafter's softmax.

        Args:
            slots: [B] int64, distinct.
            tokens: [B, first_width] int64, the last tokens of each context.
            ends: [B] int64, context lengths, prompt and verified output together, at
                least as many as are fed. A slot's cache must hold, or have evicted, all
                but those that are fed.
            num_drafts: k of this call, at least 1; ``max_drafts`` if None.
            temperatures: [B] float32, 0 where the likeliest token is to be drafted, and
                has all the probability; None for all of them. Only where
                ``draft_sample_method`` is "probabilistic".
            top_k: [B] int64, of the likeliest that tokens are drawn from: see
                ``truncated``; None where nothing is cut.
            fed: for a drafter that reads features.
            validate: whether the operations check what they are given, which waits for
                the device.
        """
        num_drafts = num_drafts or self.max_drafts
        draws = self._calls.draws(temperatures, num_drafts, top_k)
        inputs = DraftInputs(slots, ends, tokens, draws, fed)
        return self._calls.draft(inputs, num_drafts, validate=validate)

    def draft_for_nobody(self, batch: int, num_drafts: int) -> Tensor:
        """Tokens of a draft over caches as full as they get, to be timed."""
        slots = torch.full((batch,), self.cache.spare_slot, device=self.device)
        end = min(self.cache.capacity, self.max_model_len) - self.max_drafts - 1
        ends = torch.full_like(slots, max(end, FIRST_WIDTH))
        tokens = torch.zeros_like(slots)[:, None].expand(-1, self.first_width)
        fed = self.blank_fed(batch)
        return self.draft(slots, tokens, ends, num_drafts, fed=fed).tokens

    def blank_features(self, count: int) -> Tensor:
        """[count, hidden_size] of zeros, as a drafter that reads features is fed."""
        shape = count, self.drafter.config.hidden_size
        dtype = self.cache.pool.keys.dtype
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def blank_fed(self, batch: int) -> Fed | None:
        """What drafts that nobody wants are fed; None for a drafter of tokens alone."""
        if not self.reads_features:
            return None
        shape = batch, self.first_width
        features = self.blank_features(batch * self.first_width).unflatten(0, shape)
        return Fed(features, torch.ones_like(features[:, 0, 0], dtype=torch.int64))

    def capture_graphs(self, capture: Capture) -> int:
        """From now on drafts replay graphs, which ``capture`` makes.

        Returns:
            How many were captured.
        """
        return self._calls.capture(
            capture,
            num_slots=self.cache.num_slots,
            spare_slot=self.cache.spare_slot,
            width=self.first_width,
            fed=self.blank_fed(self.cache.num_slots),
        )
