"""Thinking budgets: what vLLM does wrong of them where it verifies drafts."""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method

#: Of a request's state in vLLM's holder: the output length that the state is of.
LENGTH = "budgetdraft_length"


def apply() -> None:
    """Patches both samplers. Call it in the worker."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    wrap_method(Sampler, "apply_logits_processors", _end_thinking_in_time)
    wrap_method(RejectionSampler, "apply_logits_processors", _end_thinking_in_drafts)


def _end_thinking_in_time(original: Function) -> Function:
    """Symptom: under any speculation, a request with ``thinking_token_budget`` ends
    its thinking elsewhere than without, and in a step without drafts vLLM writes the
    forced token into the first row, whoever's that is.

    Reason: vLLM looks at drafts as a whole, and finds rows by the drafts before them.
    Here its holder is asked once for each token, as it is without speculation. Remove
    when budgets under speculation end where they do without.
    """

    def apply_logits_processors(
        self: Any, logits: Tensor, sampling_metadata: Any, predict_bonus_token: bool
    ) -> Tensor:
        logits = original(
            self, logits, _without_holder(sampling_metadata), predict_bonus_token
        )
        for row, drafts, each in _thinking(sampling_metadata):
            states = each.states(drafts if predict_bonus_token else [])
            *_, last = states
            each.force(last, logits[row : row + 1])
        return logits

    return apply_logits_processors


def _end_thinking_in_drafts(original: Function) -> Function:
    """The other half of ``_end_thinking_in_time``: of all tokens but the last one."""

    def apply_logits_processors(
        self: Any, logits: Tensor, sampling_metadata: Any, metadata: Any
    ) -> Tensor:
        logits = original(self, logits, _without_holder(sampling_metadata), metadata)
        ends = list(accumulate(metadata.num_draft_tokens, initial=0))
        for row, drafts, each in _thinking(sampling_metadata):
            positions = range(ends[row], ends[row + 1])
            for position, state in zip(positions, each.states(drafts), strict=False):
                each.force(state, logits[position : position + 1])
        return logits

    return apply_logits_processors


class _Thinking:
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


def _thinking(sampling_metadata: Any) -> Iterator[tuple[int, list[int], _Thinking]]:
    """Row, drafts and state of each request that has a budget."""
    holder = sampling_metadata.thinking_budget_state_holder
    if holder is None:
        return
    for row, state in holder._state.items():
        output = sampling_metadata.output_token_ids[row]
        drafts = (sampling_metadata.spec_token_ids or {row: []})[row]
        yield row, drafts, _Thinking(holder, state, output)


def _without_holder(sampling_metadata: Any) -> Any:
    if sampling_metadata.thinking_budget_state_holder is None:
        return sampling_metadata
    return replace(sampling_metadata, thinking_budget_state_holder=None)
