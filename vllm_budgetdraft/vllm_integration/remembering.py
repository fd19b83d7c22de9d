"""How requests of an engine begin with snapshots of others, and leave their own."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.vllm_integration.metrics.statistics import DraftStatistics

#: Of vLLM's objects for a request, a ``Told``: see ``scheduler.DraftScheduler``.
ATTRIBUTE = "budgetdraft_told"


class Told(NamedTuple):
    """What vLLM's scheduler says of a request that begins.

    Attributes:
        salt: its ``cache_salt``.
        num_resets: how often the prefix cache was reset before.
        num_shared: tokens that it found there.
    """

    salt: str | None
    num_resets: int
    num_shared: int


@dataclass(frozen=True, eq=False)
class Remembered:
    """A request of which a snapshot may be kept.

    Attributes:
        scope: which others it may serve.
        tokens: [n] int32, of its context when it began.
        num_prompt: of these, those of its prompt.
        num_shared: of these, those that another request had before, as far as the
            target's prefix cache says so.
        generation: of the snapshot store when it began; of another one, nothing is
            kept.
    """

    scope: Hashable
    tokens: np.ndarray
    num_prompt: int
    num_shared: int
    generation: int


def remember(
    core: DraftProposer,
    state: Any,
    kv_budget: int | None,
    tokens: Any,
    num_prompt: int,
) -> Remembered | None:
    """What is remembered of a request as it begins; None if nothing is to be kept.

    Args:
        state: vLLM's object for the request.
        kv_budget: as it asked for.
        tokens: integers of its context, a list or an array, which are copied.
    """
    if core.snapshots is None:
        return None
    scope = scope_of(state, kv_budget or core.kv_budget)
    if scope is None:
        return None
    told: Told = getattr(state, ATTRIBUTE)
    core.snapshots.begin_generation(told.num_resets)
    copied = np.array(tokens, dtype=np.int32)
    return Remembered(scope, copied, num_prompt, told.num_shared, told.num_resets)


def start_reading(
    core: DraftProposer,
    statistics: DraftStatistics,
    slot: int,
    num_tokens: int,
    *,
    kv_budget: int | None,
    num_computed: int,
    remembered: Remembered | None,
) -> None:
    """Begins a context with the tokens that a snapshot knows, or from nothing.

    Args:
        num_tokens: of it, to be read.
        kv_budget: as the request asked for.
        num_computed: tokens that the target knew before.

    Raises:
        PagePoolExhaustedError: too few pages are free.
    """
    num_known, match, mark = 0, None, None
    if core.snapshots is not None and remembered is not None and num_tokens > 0:
        tokens = remembered.tokens[:num_tokens]
        match = core.snapshots.match(remembered.scope, tokens)
        num_known = match.spared if match else 0
        mark = core.mark(remembered.scope, tokens, remembered.num_shared, num_known)
    if not match or not core.go_on_reading(slot, num_tokens, kv_budget, match, mark):
        num_known = 0
        core.start_reading(slot, num_tokens, kv_budget, mark)
    statistics.count_reading(num_tokens, num_computed, num_known)


def start_reading_features(
    core: DraftProposer,
    statistics: DraftStatistics,
    slot: int,
    end: int,
    *,
    kv_budget: int | None,
    num_computed: int,
    remembered: Remembered | None,
) -> int:
    """The same for a drafter that reads what its target thinks of what it computes.

    Args:
        end: position of the context up to which it is to read.
        num_computed: position from which on the target computes.

    Returns:
        The position of the context that is the first of its cache's.

    Raises:
        PagePoolExhaustedError: too few pages are free.
    """
    num_known, match, origin = 0, None, num_computed
    if core.snapshots is not None and remembered is not None and num_computed:
        tokens = remembered.tokens[: num_computed + 1]
        match = core.snapshots.match(remembered.scope, tokens, num_computed)
    if match:
        first = match.snapshot.origin
        if core.go_on_reading(slot, end - first, kv_budget, match):
            origin, num_known = first, match.spared - first
    if not num_known:
        core.start_reading(slot, end - origin, kv_budget)
    # What the target does not compute is not read.
    statistics.count_reading(end - num_computed + num_known, num_known, num_known)
    return origin


def scope_of(state: Any, kv_budget: int) -> Hashable | None:
    """Requests of one scope have the same drafts after the same tokens.

    Args:
        state: vLLM's object for the request.
        kv_budget: of its draft cache.

    Returns:
        None for a request of which nothing is kept: the scheduler said nothing of it,
        or not all of it is tokens.
    """
    told: Told | None = getattr(state, ATTRIBUTE, None)
    if told is None or state.prompt_embeds is not None:
        return None
    lora = state.lora_request and state.lora_request.lora_name
    pictures = tuple(feature.identifier for feature in state.mm_features or ())
    return kv_budget, lora, pictures, told.salt, told.num_resets


def tell_scopes(states: dict[str, Any], new_requests: Iterable[Any]) -> None:
    """Hands on what the scheduler said of requests that it begins."""
    for request in new_requests:
        told = getattr(request, ATTRIBUTE, None)
        if told is not None and (state := states.get(request.req_id)):
            setattr(state, ATTRIBUTE, told)


def written_by(state: Any) -> np.ndarray:
    """[n] int32, what a request of model runner V1 has written, as far as is known."""
    tokens = np.array(state.output_token_ids, dtype=np.int32)
    unknown = tokens < 0  # vLLM's sign for what is still to be copied from a device
    return tokens[: unknown.argmax()] if unknown.any() else tokens
