"""Which request holds which slot of the proposer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_budgetdraft.config import RequestSettings


@dataclass
class Holding:
    """A request's slot, and what its draft cache stands on.

    Attributes:
        state: vLLM's object for the request; its identity tells a request from another
            one that reuses its id.
        settings: what it asked for.
        is_read: whether its context is in its cache, which from then on grows by
            drafting.
        num_tokens: context length at the last draft.
        drafts: tokens drafted then.
    """

    slot: int
    state: Any
    settings: RequestSettings = RequestSettings()
    is_read: bool = False
    num_tokens: int = 0
    drafts: list[int] = field(default_factory=list)

    def continues(self, context: Any, sampled: bool) -> bool:
        """Whether ``context`` (token ids) goes on from the last draft.

        The cache then holds all but the last two tokens: those before the last draft,
        and the drafts that were accepted. Before the next token is sampled, it only
        must not have been rolled back.
        """
        grown = len(context) - self.num_tokens
        if not sampled:
            return grown >= 0
        if not 1 <= grown <= len(self.drafts) + 1:
            return False
        return self.drafts[: grown - 1] == list(context[self.num_tokens : -1])


class RequestSlots:
    """Slots by request id. Slots outlive rows: preempted requests keep theirs."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[str, Holding] = {}
        self._given_up: dict[str, Any] = {}

    def get(self, request_id: str, state: Any) -> Holding | None:
        holding = self._held.get(request_id)
        return holding if holding and holding.state is state else None

    def take(
        self, request_id: str, state: Any, settings: RequestSettings | None = None
    ) -> Holding:
        """A free slot for a request that holds none; one must be free."""
        holding = Holding(self._free.pop(), state, settings or RequestSettings())
        self._held[request_id] = holding
        return holding

    def holds(self, request_id: str, holding: Holding | None) -> bool:
        return self._held[request_id] is holding

    def release(self, request_id: str) -> int:
        slot = self._held.pop(request_id).slot
        self._free.append(slot)
        return slot

    def give_up(self, request_id: str, state: Any) -> None:
        """Remembers a request that drafts no more."""
        self._given_up[request_id] = state

    def has_given_up(self, request_id: str, state: Any) -> bool:
        return self._given_up.get(request_id) is state

    def forget_ended(self, live: Mapping[str, Any]) -> None:
        """Forgets requests that drafted no more and are over by now."""
        self._given_up = {
            request_id: state
            for request_id, state in self._given_up.items()
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
