"""vLLM's samplers in model runner V2, where what they do under speculation is wrong."""

from typing import Any

from torch import Tensor
from typing_extensions import override
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class DraftingSampler(Sampler):
    """Samples where there are no drafts."""

    @override
    def add_request(self, index: int, sampling_params: Any) -> None:
        """The other half of ``DraftVerifier``: who names tokens asks for as many
        logprobs. Where nobody asks for any, nothing is gathered.
        """
        super().add_request(index, sampling_params)
        if sampling_params.logprob_token_ids:
            count = len(sampling_params.logprob_token_ids)
            self.sampling_states.num_logprobs[index] = count


class DraftVerifier(RejectionSampler):
    """Verifies drafts, and samples the first token that is none."""

    @override
    def __call__(self, logits: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Symptom: under any speculation in model runner V2, a request with
        ``logprob_token_ids`` gets logprobs for its first token only; beside one with
        ``logprobs``, those of the likeliest tokens.

        Reason: where vLLM verifies drafts it knows of the likeliest tokens alone.
        Remove when it gathers those that are named.
        """
        named = self.sampler.logprob_token_ids_state
        most = named.max_num_token_ids(batch.idx_mapping_np)
        if not most:
            return super().__call__(logits, batch, *args, **kwargs)
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
            return super().__call__(logits, batch, *args, **kwargs)
        finally:
            rejection_sampler.compute_topk_scores = compute
