"""Which requests a snapshot of another one's draft cache may serve."""

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

#: Of vLLM's objects for a request, what its scheduler says of that: see
#: ``patches.snapshots``.
ATTRIBUTE = "budgetdraft_scope"


def scope_of(state: Any, kv_budget: int) -> Hashable | None:
    """Requests of one scope have the same drafts after the same tokens.

    Args:
        state: vLLM's object for the request.
        kv_budget: of its draft cache.

    Returns:
        None for a request of which nothing is kept: the scheduler said nothing of it,
        or not all of it is tokens.
    """
    told = getattr(state, ATTRIBUTE, None)
    if told is None or state.prompt_embeds is not None:
        return None
    lora = state.lora_request and state.lora_request.lora_name
    pictures = tuple(feature.identifier for feature in state.mm_features or ())
    return kv_budget, lora, pictures, told


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
