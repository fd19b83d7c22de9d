"""Reading contexts before drafting: what of them is read, and what is kept."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from vllm_budgetdraft import environment
from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.attention.prompt import PromptAttention, Segment
from vllm_budgetdraft.cache.budgeted_cache import BudgetedCache
from vllm_budgetdraft.cache.ranges import packed_ranges
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.base import (
    EvictionPolicy,
    PromptStates,
    check_selection,
)
from vllm_budgetdraft.eviction.reading import ReadingPlan
from vllm_budgetdraft.proposer.reading import Begun, Mark, Reading

#: ``tokens_of(pieces)``: the tokens at these positions of the slots' contexts, packed
#: one after another, int64 on the device; or their features, [T, hidden_size].
TokensOf = Callable[[list[tuple[int, range]]], Tensor]


class PromptReader:
    """Reads contexts, a piece of each in one pass, through a buffer that they share."""

    def __init__(
        self,
        drafter: Drafter,
        policy: EvictionPolicy,
        prompt: PromptAttention,
        cache: BudgetedCache,
        view: ViewSettings,
        *,
        kv_budget: int,
        pass_tokens: int,
    ) -> None:
        """
        Args:
            prompt: the buffer; it holds the longest context at least.
            kv_budget: most prompt tokens that a request keeps.
            pass_tokens: most tokens of a pass.
        """
        self._drafter = drafter
        self._policy = policy
        self.prompt = prompt
        self._cache = cache
        self._view = view
        self._is_relative = view.position_mode == "cache_relative"
        self._max_budget = kv_budget
        self._pass_tokens = pass_tokens
        self._readings: dict[int, Reading] = {}  # the oldest first

    def start(
        self,
        slot: int,
        num_tokens: int,
        kv_budget: int | None = None,
        begun: Begun = Begun(),  # noqa: B008, it is immutable
        mark: Mark | None = None,
    ) -> None:
        """Begins the context of a slot.

        Args:
            num_tokens: of the context, to be read.
            kv_budget: as given to ``DraftProposer.start_request``.
            begun: what of it the slot's cache has. It is chosen from, together with
                what is read.
        """
        budget = min(kv_budget or self._max_budget, self._max_budget)
        plan = self._plan(num_tokens, budget)
        assert slot not in self._readings, slot
        self._readings[slot] = Reading(
            slot,
            plan,
            num_tokens,
            budget,
            plan.most_held(num_tokens, budget),
            num_seen=begun.num_seen,
            begun=begun,
            mark=mark,
        )

    def _plan(self, num_tokens: int, budget: int) -> ReadingPlan:
        return ReadingPlan.of(
            self._view,
            self._policy,
            native_tokens=self._drafter.config.max_position_embeddings,
            num_tokens=num_tokens,
            budget=budget,
        )

    def can_begin_with(self, begun: Begun, num_tokens: int, budget: int) -> bool:
        """Whether there is room to read beside what a slot has of a context."""
        most_held = self._plan(num_tokens, budget).most_held(num_tokens, budget)
        return begun.num_held < most_held or begun.num_seen >= num_tokens

    def stop(self, slot: int) -> None:
        """Forgets the context of a slot, if it is being read."""
        if reading := self._readings.pop(slot, None):
            self._free(reading)

    def stop_all(self) -> None:
        for slot in list(self._readings):
            self.stop(slot)

    def restart(self, slot: int) -> int:
        """Has a context that is being read begin anew; where it was."""
        reading = self._readings[slot]
        self._free(reading)
        num_seen, reading.num_seen = reading.num_seen, reading.begun.num_seen
        reading.segment, reading.has_chosen = None, False
        return num_seen - reading.num_seen

    def _free(self, reading: Reading) -> None:
        if reading.segment is not None:
            self.prompt.close(reading.segment)

    def is_reading(self, slot: int) -> bool:
        return slot in self._readings

    @torch.inference_mode()
    def read(
        self,
        slots: Collection[int],
        tokens_of: TokensOf,
        limit: int,
        features_of: TokensOf | None = None,
        ends: Mapping[int, int] | None = None,
    ) -> None:
        """Reads on, and moves what is kept of whole contexts into their slots.

        Args:
            slots: that have begun. Others that hold part of the buffer leave it, and
                begin anew when their turn comes.
            limit: most tokens to read.
            features_of: for a drafter that reads features.
            ends: of slots, where what can be read now ends, if that is not all; others
                keep their part of the buffer then.
        """
        if ends is None:  # else what is lost cannot be read again
            for slot, reading in self._readings.items():
                if reading.segment is not None and slot not in slots:
                    self.restart(slot)
        readings = [each for slot, each in self._readings.items() if slot in slots]
        readings.sort(key=lambda each: each.segment is None)  # those go on first
        while True:
            self._finish([each for each in readings if not each.unread])
            readings = [each for each in readings if each.unread]
            pieces = self._next(readings, limit, ends)
            if not pieces:
                return
            asked = [(reading.slot, piece) for reading, piece in pieces]
            tokens = tokens_of(asked)
            self._pass(pieces, tokens, features_of(asked) if features_of else None)
            limit -= len(tokens)

    def read_each(
        self, slots: Collection[int], tokens_of: TokensOf, limit: int
    ) -> dict[int, Exception]:
        """Reads on in contexts that were started: see ``read``.

        One of them may be at fault where reading fails: then each is read by itself.

        Returns:
            Why slots failed. They are not being read any more, nor are those that are
            read to their ends.
        """
        try:
            self.read(slots, tokens_of, limit)
        except Exception as error:
            unread = [slot for slot in slots if self.is_reading(slot)]
            if len(unread) == 1:
                self.stop(unread[0])
                return {unread[0]: error}
            failed: dict[int, Exception] = {}
            seen = [self.restart(slot) for slot in unread]
            for slot, num_seen in zip(unread, seen, strict=True):
                # As far as it was, and on: there it is that one of them fails.
                failed |= self.read_each([slot], tokens_of, num_seen + limit)
            return failed
        return {}

    def read_pieces(
        self, tokens_of: TokensOf, features_of: TokensOf, ends: Mapping[int, int]
    ) -> dict[int, Exception]:
        """Reads what is at hand now of contexts that were started, and never again.

        Args:
            ends: of slots, where in their contexts that ends.

        Returns:
            Why slots failed. All of these did, if one: they are not read any more.
        """
        try:
            total = sum(ends.values())  # at most
            self.read(list(ends), tokens_of, total, features_of, ends)
        except Exception as error:
            for slot in ends:
                self.stop(slot)
            return dict.fromkeys(ends, error)
        return {}

    def lacks(self, slot: int, end: int) -> bool:
        """Whether a slot has yet to read something before ``end`` of its context."""
        reading = self._readings.get(slot)
        return reading is not None and len(reading.piece(1, end)) > 0

    def _next(
        self, readings: list[Reading], limit: int, ends: Mapping[int, int] | None
    ) -> list[tuple[Reading, range]]:
        """What the next pass reads: of the first ones, as far as there is room."""
        limit = min(limit, self._pass_tokens)
        room = self.prompt.max_tokens - sum(
            each.most_held
            for each in self._readings.values()
            if each.segment is not None
        )
        pieces = []
        for reading in readings:
            if not limit:
                break
            piece = reading.piece(limit, ends[reading.slot] if ends else None)
            if not piece:
                continue
            if reading.segment is None:
                if reading.most_held > room:
                    if ends is None:
                        break
                    continue  # a shorter one may find room, for none can wait
                room -= reading.most_held
                reading.segment = self.prompt.open()
                if count := reading.begun.num_held:
                    states = self._cache.states_of(reading.slot, count)
                    self.prompt.load(reading.segment, *states)
            limit -= len(piece)
            pieces.append((reading, piece))
        return pieces

    def _pass(
        self,
        pieces: list[tuple[Reading, range]],
        tokens: Tensor,
        features: Tensor | None,
    ) -> None:
        positions, grown = [], []
        for reading, piece in pieces:
            assert reading.segment is not None
            start = reading.segment.num_held if self._is_relative else piece.start
            positions.append(range(start, start + len(piece)))
            grown.append((reading.segment, len(piece)))
        at = packed_ranges(positions, tokens.device)
        attend = self.prompt.extend(grown, *self._drafter.rotary(at))
        self._drafter.step(tokens, features, attend)
        for reading, piece in pieces:
            reading.num_seen = piece.stop
            reading.has_chosen = reading.has_to_choose(piece)
        chosen = [reading for reading, _ in pieces if reading.has_chosen]
        for reading, _ in pieces:
            if reading.mark is not None and reading.num_seen == reading.mark.at:
                self._keep_for_others(reading)
        for segment, kept in self._select(chosen):
            self.prompt.keep(segment, kept)

    def _keep_for_others(self, reading: Reading) -> None:
        mark, reading.mark = reading.mark, None
        assert mark is not None and reading.segment is not None
        ((segment, kept),) = self._select([reading])
        prompt = self.prompt
        states = prompt.keys, prompt.values, prompt.received
        with suppress(RuntimeError):  # nobody needs it: memory may be short
            mark.keep(states, kept + segment.start)

    def _finish(self, readings: list[Reading]) -> None:
        """Moves what is kept of contexts that are read into their slots."""
        full = [each for each in readings if each.segment is not None]
        kept = dict(self._select([each for each in full if not each.has_chosen]))
        slots, rows, seen = [], [], []
        for reading in full:
            segment = reading.segment
            assert segment is not None
            chosen = kept.get(segment)
            if chosen is None:  # what is left is what was chosen
                chosen = self._states(segment).all_positions()
            slots.append(reading.slot)
            rows.append(chosen + segment.start)
            seen.append(reading.num_seen)
        if full:
            prompt = self.prompt
            self._cache.load_prompts(
                slots, prompt.keys, prompt.values, rows, seen, prompt.received
            )
        for reading in readings:
            self.stop(reading.slot)

    def _select(self, readings: list[Reading]) -> list[tuple[Segment, Tensor]]:
        """Rows of each segment to keep, [num_layers, num_kv_heads, n].

        The policy is asked once for all that hold and observe as many tokens.

        Raises:
            ValueError: the policy's choice is none.
        """
        groups = defaultdict(list)
        for reading in readings:
            assert reading.segment is not None
            num_held, queries = reading.segment.num_held, reading.segment.queries
            seen = 0 if queries is None else queries.shape[1]
            groups[num_held, reading.budget, seen].append(reading.segment)
        selected: list[tuple[Segment, Tensor]] = []
        for (num_held, budget, _), segments in groups.items():
            states = list(map(self._states, segments))
            # One by itself is not copied.
            together = states[0] if len(states) == 1 else _stacked(states)
            kept = self._policy.select(together, budget)
            # On a GPU nothing waits for its values, and one outside would end the
            # process.
            looks = not is_gpu(kept.device) or environment.check_invariants()
            check_selection(kept, together, budget, values=looks)
            if not looks:
                kept = kept.clamp(0, num_held - 1)
            selected += zip(segments, [kept] if len(states) == 1 else kept, strict=True)
        return selected

    def _states(self, segment: Segment) -> PromptStates:
        prompt = self.prompt
        keys = prompt.keys_as_read(segment).transpose(1, 2)
        return PromptStates(
            keys, prompt.last_queries(segment), prompt.received_by(segment)
        )


def _stacked(states: list[PromptStates]) -> PromptStates:
    """States of prompts of one length, with a leading dimension for the prompts."""

    def stack(each: list[Tensor | None]) -> Tensor | None:
        found = [tensor for tensor in each if tensor is not None]
        return torch.stack(found) if found else None

    return PromptStates(
        torch.stack([each.keys for each in states]),
        stack([each.queries for each in states]),
        stack([each.received for each in states]),
    )
