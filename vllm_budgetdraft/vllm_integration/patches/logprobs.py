"""Logprobs of tokens that a request names: what vLLM's samplers get wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method


def apply() -> None:
    """Patches both samplers. Call it in the worker."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    wrap_method(Sampler, "forward", _gather_for_each)
    wrap_method(RejectionSampler, "forward", _gather_for_each_draft)


def _gather_for_each_draft(original: Function) -> Function:
    """Symptom: under any speculation, a request with ``logprob_token_ids`` gets
    logprobs for its first token only; beside one with ``logprobs``, the engine dies
    ("shape mismatch").

    Reason: vLLM gathers them for the token after the last draft, where it then looks
    for all logits, and for no other. Remove when it gathers them for all.
    """

    def forward(
        self: Any,
        metadata: Any,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: Any,
    ) -> Any:
        num_requests = len(metadata.num_draft_tokens)
        with _gathering(self.sampler, sampling_metadata, num_requests) as changed:
            return original(self, metadata, draft_probs, logits, changed)

    return forward


def _gather_for_each(original: Function) -> Function:
    """Symptom: beside a request with ``logprob_token_ids``, one with ``logprobs`` gets
    its sampled tokens' alone.

    Reason: vLLM takes the one kind for a whole batch, without speculation, too, and in
    steps without drafts. Remove when it gathers for each request what that asked for.
    """

    def forward(
        self: Any, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with _gathering(self, sampling_metadata, len(logits)) as changed:
            return original(self, logits, changed, *args, **kwargs)

    return forward


@contextmanager
def _gathering(
    sampler: Any, sampling_metadata: Any, num_requests: int
) -> Iterator[Any]:
    """Has a sampler gather what each request asks for, where some name tokens.

    Yields:
        Metadata that let it gather the likeliest tokens' of all.
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


def apply_to_runner_v2() -> None:
    """Patches the samplers of model runner V2. Call it in the worker."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    wrap_method(Sampler, "add_request", _count_named)
    wrap_method(RejectionSampler, "__call__", _gather_named)


def _gather_named(original: Function) -> Function:
    """Symptom: under any speculation in model runner V2, a request with
    ``logprob_token_ids`` gets logprobs for its first token only; beside one with
    ``logprobs``, those of the likeliest tokens.

    Reason: where vLLM verifies drafts it knows of the likeliest tokens alone. Remove
    when it gathers those that are named.
    """
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    def verify(self: Any, logits: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Any:
        named = self.sampler.logprob_token_ids_state
        most = named.max_num_token_ids(batch.idx_mapping_np)
        if not most:
            return original(self, logits, batch, *args, **kwargs)
        compute, num_done = rejection_sampler.compute_topk_scores, 0

        def compute_topk_scores(chunk: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal num_done
            start, num_done = num_done, num_done + len(chunk)
            return compute(
                chunk,
                *args,
                logprob_token_ids_state=named,
                expanded_idx_mapping=batch.expanded_idx_mapping[start:num_done],
                max_per_req_token_ids=most,
                **kwargs,
            )

        rejection_sampler.compute_topk_scores = compute_topk_scores
        try:
            return original(self, logits, batch, *args, **kwargs)
        finally:
            rejection_sampler.compute_topk_scores = compute

    return verify


def _count_named(original: Function) -> Function:
    """The other half of ``_gather_named``: who names tokens asks for as many logprobs.

    Where nobody asks for any, nothing is gathered.
    """

    def add_request(self: Any, index: int, sampling_params: Any) -> None:
        original(self, index, sampling_params)
        if sampling_params.logprob_token_ids:
            count = len(sampling_params.logprob_token_ids)
            self.sampling_states.num_logprobs[index] = count

    return add_request
