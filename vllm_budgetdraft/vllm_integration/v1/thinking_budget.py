"""Thinking budgets, for each token as vLLM has them without speculation."""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any

from torch import Tensor

#: Of a request's state in vLLM's holder: the output length that the state is of.
LENGTH = "budgetdraft_length"


class Thinking:
    """One request with a budget, and vLLM's holder as it is without speculation."""

    def __init__(self, holder: Any, state: dict[str, Any], output: list[int]) -> None:
        self._holder = copy(holder)
        self._holder.in_spec_mode = False
        self._state, self._output = state, output

    def states(self, drafts: list[int]) -> Iterator[dict[str, Any]]:
        """After the output, and after each of the drafts as if it were accepted."""
        length = len(self._output)
        for end in range(self._state.get(LENGTH, length - 1) + 1, length + 1):
            self._update(self._state, self._output[:end])
        self._state[LENGTH] = length
        yield self._state
        state, tokens = dict(self._state), list(self._output)
        for draft in drafts:
            tokens = [*tokens, draft]
            self._update(state, tokens)
            yield state

    def force(self, state: dict[str, Any], logits: Tensor) -> None:
        """Has logits [1, V] choose what ends the thinking, if it is due."""
        self._holder._state = {0: state}
        self._holder.apply_to_logits(logits, False, None)

    def _update(self, state: dict[str, Any], tokens: list[int]) -> None:
        self._holder._state = {0: state}
        self._holder.update_state([tokens], None)


def thinking(sampling_metadata: Any) -> Iterator[tuple[int, list[int], Thinking]]:
    """Row, drafts and state of each request that has a budget."""
    holder = sampling_metadata.thinking_budget_state_holder
    if holder is None:
        return
    for row, state in holder._state.items():
        output = sampling_metadata.output_token_ids[row]
        drafts = (sampling_metadata.spec_token_ids or {row: []})[row]
        yield row, drafts, Thinking(holder, state, output)


def without_holder(sampling_metadata: Any) -> Any:
    """vLLM's sampling metadata as of requests without a budget."""
    if sampling_metadata.thinking_budget_state_holder is None:
        return sampling_metadata
    return replace(sampling_metadata, thinking_budget_state_holder=None)
