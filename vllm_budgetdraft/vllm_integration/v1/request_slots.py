"""Which request holds which slot of the proposer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_budgetdraft.config import RequestSettings
from vllm_budgetdraft.vllm_integration.remembering import Remembered
from vllm_budgetdraft.vllm_integration.sampling import DraftSampling


@dataclass
class Holding:
    """A request's slot, and what its draft cache stands on.

    Attributes:
        state: vLLM's object for the request; its identity tells a request from another
            one that reuses its id.
        settings: what it asked for.
        sampling: how its drafts are drawn.
        is_read: whether its context is in its cache, which from then on grows by
            drafting.
        num_tokens: context length when it was last looked at.
        num_cached: first tokens of that context that the cache holds, or that are to
            be read into it.
        fed: drafts that the cache holds after the context.
        num_waited: steps in which it sampled and had no drafts; None after the first.
        origin, last_token: see ``FeatureDrafting``.
        remembered: None where nothing is kept of it.
    """

    slot: int
    state: Any
    settings: RequestSettings = RequestSettings()
    sampling: DraftSampling = DraftSampling()
    is_read: bool = False
    num_tokens: int = 0
    num_cached: int = 0
    fed: list[int] = field(default_factory=list)
    num_waited: int | None = 0
    origin: int = 0
    last_token: int = -1
    remembered: Remembered | None = None

    def goes_on(self, context: Any, sampled: bool) -> bool:
        """Takes the drafts that ``context`` (token ids) begins with for cached.

        Returns:
            Whether the cache is of use: it is not if the context was rolled back.
        """
        grown = len(context) - self.num_tokens
        if grown < sampled:
            return False
        if sampled:
            for draft, token in zip(self.fed, context[self.num_cached :], strict=False):
                if draft != token:
                    break
                self.num_cached += 1
            self.fed = []
        self.num_tokens = len(context)
        return True

    def drafted(self, num_tokens: int, fed: list[int]) -> None:
        """Notes that a context was fed, and drafts after it."""
        self.num_tokens = self.num_cached = num_tokens
        self.fed = fed


class RequestSlots:
    """Slots by request id. Slots outlive rows: preempted requests keep theirs."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[str, Holding] = {}
        self._given_up: dict[str, tuple[Any, str]] = {}

    def get(self, request_id: str, state: Any) -> Holding | None:
        holding = self._held.get(request_id)
        return holding if holding and holding.state is state else None

    def holding(self, request_id: str) -> Holding:
        return self._held[request_id]

    def take(self, request_id: str, state: Any, **attributes: Any) -> Holding:
        """A free slot for a request that holds none; one must be free."""
        holding = Holding(self._free.pop(), state, **attributes)
        self._held[request_id] = holding
        return holding

    def release(self, request_id: str) -> int:
        slot = self._held.pop(request_id).slot
        self._free.append(slot)
        return slot

    def release_all(self) -> None:
        for request_id in list(self._held):
            self.release(request_id)

    def give_up(self, request_id: str, state: Any, reason: str) -> None:
        """Remembers a request that drafts no more."""
        self._given_up[request_id] = state, reason

    def why_given_up(self, request_id: str, state: Any) -> str | None:
        """The reason, or None for a request that may draft."""
        known, reason = self._given_up.get(request_id, (None, ""))
        return reason if known is state else None

    def forget_ended(self, live: Mapping[str, Any]) -> None:
        """Forgets requests that drafted no more and are over by now."""
        self._given_up = {
            request_id: (state, reason)
            for request_id, (state, reason) in self._given_up.items()
            if live.get(request_id) is state
        }

    def ended(self, live: Mapping[str, Any]) -> list[str]:
        """Ids whose request is over, or is another one by now."""
        return [
            request_id
            for request_id, holding in self._held.items()
            if live.get(request_id) is not holding.state
        ]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def idle(self, batch: Collection[str]) -> list[str]:
        """Ids outside ``batch``, whose slots may go to others; the oldest first."""
        return [held for held in self._held if held not in batch]
