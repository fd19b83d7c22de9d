"""Logprobs of tokens that a request names, beside requests that name none."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor


@contextmanager
def gathering(sampler: Any, sampling_metadata: Any, num_requests: int) -> Iterator[Any]:
    """Has a sampler gather what each request asks for, where some name tokens.

    Yields:
        Metadata by which the sampler gathers logprobs for every request.
    """
    named = sampling_metadata.logprob_token_ids
    if not named:
        yield sampling_metadata
        return
    gather_likeliest = sampler.gather_logprobs

    def gather_logprobs(logprobs: Tensor, count: int, token_ids: Tensor) -> Any:
        likeliest = gather_likeliest(logprobs, count, token_ids).logprob_token_ids
        per_request = len(token_ids) // num_requests
        wanted = {
            row: named.get(row // per_request, tokens)
            for row, tokens in enumerate(likeliest[:, 1:].tolist())
        }
        return sampler.gather_specific_token_logprobs(logprobs, wanted, token_ids)

    sampler.gather_logprobs = gather_logprobs
    try:
        yield replace(
            sampling_metadata,
            logprob_token_ids=None,
            max_num_logprobs=sampling_metadata.max_num_logprobs or 0,
        )
    finally:
        del sampler.gather_logprobs
