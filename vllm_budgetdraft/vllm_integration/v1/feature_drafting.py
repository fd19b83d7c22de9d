"""Requests of a batch to drafts, for a drafter that reads what its target thought.

What the target thought of a token is at hand in the step that computes it, and never
again. So each step's tokens are read in that step, a prompt's pieces among them; and
where they cannot be, a request begins anew with the tokens of the next step: what is
before them the drafter does not know. That is so for a prefix that vLLM has cached,
too.

The drafter's position p takes token p + 1 of the context and the target's state at
token p, as vLLM's own EAGLE-3 has it; a context of n tokens is n - 1 positions long.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.errors import PagePoolExhaustedError
from vllm_budgetdraft.proposer.draft_loop import Fed
from vllm_budgetdraft.vllm_integration.remembering import start_reading_features
from vllm_budgetdraft.vllm_integration.sampling import as_tensors
from vllm_budgetdraft.vllm_integration.v1.draft_lists import (
    NOT_FINITE,
    confident,
    marked,
)
from vllm_budgetdraft.vllm_integration.v1.drafting import Request, max_drafts
from vllm_budgetdraft.vllm_integration.v1.own_cache_drafting import OwnCacheDrafting
from vllm_budgetdraft.vllm_integration.v1.request_slots import Holding


class FeatureDrafting(OwnCacheDrafting):
    """Drafts for requests that hold slots of a ``DraftProposer`` of features.

    Of a ``Holding``, ``origin`` is the first position that its cache knows,
    ``num_cached`` the position that comes next, ``last_token`` the context's token
    there, and ``num_tokens`` the position up to which a prompt is read.
    """

    def draft(
        self,
        requests: list[Request],
        is_trial: bool = False,
        states: Tensor | None = None,
    ) -> dict[int, list[int]]:
        """See ``OwnCacheDrafting``.

        Args:
            states: [num_tokens, N * hidden_size], of the target's layers, of every
                token of the step.
        """
        assert states is not None
        self.probabilities = None
        self._batch = requests
        batch = {request.request_id for request in requests}
        able = self._able(requests, batch)
        self._features = self._combined(states)
        reading = [each for each in able if not each[1].is_read]
        just_read = self._read_pieces(reading)
        ready = [each for each in able if each[1].is_read and each[0].sampled]
        firsts = {
            request.row: len(request.context) - 2
            if holding.slot in just_read
            else request.num_computed
            for request, holding in ready
        }
        drafting = [each for each in ready if max_drafts(each[0], each[1].settings)]
        others = [each for each in ready if not max_drafts(each[0], each[1].settings)]
        drafts = self._fed(drafting, firsts) if drafting else {}
        if others:
            self._fed(others, firsts, num_drafts=0)
        del self._features
        for request, holding in able:
            holding.num_cached = request.num_computed + request.num_scheduled
            if request.sampled:
                holding.num_cached = len(request.context) - 1
            last = min(holding.num_cached, len(request.context) - 1)
            holding.last_token = int(request.context[last])
        if drafts:
            self._faults.drafted()
        self.has_only_drafted = not reading and len(drafts) == len(able)
        self._count(requests, drafts)
        return drafts

    def _combined(self, states: Tensor) -> Tensor:
        """[num_tokens, hidden_size], of the drafter's type."""
        drafter, dtype = self._core.drafter, self._core.cache.pool.keys.dtype
        assert isinstance(drafter, FeatureDrafter)
        with torch.inference_mode():
            return drafter.combined(states.to(dtype))

    def _up_to_date(self, request: Request, batch: set[str]) -> Holding | None:
        """A slot whose cache goes on with this step's tokens, or begins with them."""
        holding = self._holding(request)
        if holding is not None:
            if self._goes_on(request, holding):
                return holding
            self._end(request.request_id)
        return self._start(request, batch)

    def _goes_on(self, request: Request, holding: Holding) -> bool:
        """Whether a cache is of this context, and its next position comes now.

        Not so after a preemption, nor where a session goes on with other tokens than
        were sampled.
        """
        first = request.num_computed
        if holding.num_cached != first or holding.last_token != request.context[first]:
            return False
        if not holding.is_read:
            return holding.num_tokens == _last_read(request)
        new = len(request.context) - 1 - first
        return request.sampled and new <= self._core.first_width

    def _begin(self, request: Request, holding: Holding) -> None:
        holding.num_cached = request.num_computed
        holding.num_tokens = _last_read(request)
        holding.origin = start_reading_features(
            self._core,
            self.statistics,
            holding.slot,
            holding.num_tokens,
            kv_budget=holding.settings.kv_budget,
            num_computed=request.num_computed,
            remembered=self._remembered(request, holding),
        )

    def _read_pieces(self, reading: list[tuple[Request, Holding]]) -> set[int]:
        """Reads what this step computed of contexts; slots that are read to the end."""
        by_slot = {holding.slot: (request, holding) for request, holding in reading}
        ends = {
            slot: min(request.num_computed + request.num_scheduled, _last_read(request))
            - holding.origin
            for slot, (request, holding) in by_slot.items()
        }

        def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
            parts = []
            for slot, piece in pieces:
                request, holding = by_slot[slot]
                following = request.context[holding.origin + 1 :]
                parts.append(following[piece.start : piece.stop])
            return self._tensor(np.concatenate(parts))

        def features_of(pieces: list[tuple[int, range]]) -> Tensor:
            rows: list[int] = []
            for slot, piece in pieces:
                request, holding = by_slot[slot]
                shift = request.first_state - request.num_computed + holding.origin
                rows += range(shift + piece.start, shift + piece.stop)
            return self._features[self._tensor(rows)]

        failed = self._core.reader.read_pieces(tokens_of, features_of, ends)
        finished = set()
        for slot, (request, holding) in by_slot.items():
            if error := failed.get(slot):
                self._drop(request, error)
            elif self._core.reader.lacks(slot, ends[slot]):
                # The buffer holds others: what is not read now never will be.
                self._drop(request, PagePoolExhaustedError("no room to read a prompt"))
            elif not self._core.reader.is_reading(slot):
                holding.is_read = True
                finished.add(slot)
        return finished

    def _fed(
        self,
        ready: list[tuple[Request, Holding]],
        firsts: Mapping[int, int],
        num_drafts: int | None = None,
    ) -> dict[int, list[int]]:
        """Feeds what the target verified in this step, and drafts by row.

        Args:
            firsts: by row, the first position that is to be fed.
            num_drafts: 0 to draft nothing; as many as are asked for if None.
        """
        try:
            return self._fed_together(ready, firsts, num_drafts)
        except Exception as error:
            self.probabilities = None
            if len(ready) == 1:
                self._drop(ready[0][0], error)
                return {}
        # One of them may be at fault: each by itself, without probabilities.
        alone = [self._fed([each], firsts, num_drafts) for each in ready]
        self.probabilities = None
        return {row: drafted for each in alone for row, drafted in each.items()}

    def _fed_together(
        self,
        ready: list[tuple[Request, Holding]],
        firsts: Mapping[int, int],
        num_drafts: int | None,
    ) -> dict[int, list[int]]:
        core, width = self._core, self._core.first_width
        rows = []
        for request, holding in ready:
            first, end = firsts[request.row], len(request.context) - 1
            count = end - first
            assert 0 < count <= width, (count, width)
            places = [min(first + i, end - 1) for i in range(width)]
            state = request.first_state - request.num_computed
            rows.append(
                [
                    *(holding.slot, end - holding.origin, count),
                    *request.context[[place + 1 for place in places]].tolist(),
                    *[state + place for place in places],
                ]
            )
        found = self._tensor(rows)
        slots, ends, counts = found[:, :3].unbind(1)
        tokens, places = found[:, 3:].split(width, 1)
        features = self._features[places]
        if num_drafts == 0:
            core.append(slots, tokens, ends - counts, features)
            return {}
        temperatures, top_k = as_tensors([h.sampling for _, h in ready], core.device)
        drafted, confidences, probabilities = core.draft(
            slots,
            tokens,
            ends,
            max(max_drafts(request, held.settings) for request, held in ready),
            temperatures,
            top_k,
            Fed(features, counts),
        )
        if probabilities is not None:
            ids = [request.request_id for request, _ in ready]
            self.probabilities = ids, probabilities
        lists = marked(drafted, confidences, core.config.draft_confidence_threshold)
        sound = {}
        for (request, holding), each in zip(ready, lists, strict=True):
            if NOT_FINITE in each:
                self._drop(request, FloatingPointError("logits are not finite"))
                continue
            limit = max_drafts(request, holding.settings)
            sound[request.row] = confident(each)[:limit]
        return sound

    def _why_not(self, request: Request) -> str:
        if reason := self._slots.why_given_up(request.request_id, request.state):
            return reason
        if (holding := self._holding(request)) is None:
            return "no_pages"
        if not request.max_drafts:
            return "draft_length"
        return "not_confident" if holding.is_read else "reading"


def _last_read(request: Request) -> int:
    """The position where reading ends and drafting feeds: of the last token."""
    return len(request.context) - 1 - request.sampled
