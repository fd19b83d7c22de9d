"""vLLM's samplers in model runner V1, where what they do under speculation is wrong."""

from copy import copy
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
)
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from vllm_budgetdraft.vllm_integration.v1.named_logprobs import gathering
from vllm_budgetdraft.vllm_integration.v1.seeds import past_drafts
from vllm_budgetdraft.vllm_integration.v1.thinking_budget import (
    thinking,
    without_holder,
)


class DraftingSampler(Sampler):
    """Samples where there are no drafts, and what follows the last ones."""

    @override
    def forward(
        self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Symptom: beside a request with ``logprob_token_ids``, one with ``logprobs``
        gets its sampled tokens' alone.

        Reason: vLLM takes the one kind for a whole batch, without speculation, too.
        Remove when it gathers for each request what that asked for.
        """
        with gathering(self, sampling_metadata, len(logits)) as changed:
            return super().forward(logits, changed, *args, **kwargs)

    @override
    def apply_logits_processors(
        self, logits: Tensor, sampling_metadata: Any, predict_bonus_token: bool
    ) -> Tensor:
        """Symptom: under any speculation, a request with ``thinking_token_budget`` ends
        its thinking elsewhere than without, and in a step without drafts vLLM writes
        the forced token into the first row, whoever's that is.

        Reason: vLLM looks at drafts as a whole, and finds rows by the drafts before
        them. Here its holder is asked once for each token, as it is without
        speculation. Remove when budgets under speculation end where they do without.
        """
        logits = super().apply_logits_processors(
            logits, without_holder(sampling_metadata), predict_bonus_token
        )
        for row, drafts, each in thinking(sampling_metadata):
            states = each.states(drafts if predict_bonus_token else [])
            *_, last = states
            each.force(last, logits[row : row + 1])
        return logits


class DraftVerifier(RejectionSampler):
    """Verifies drafts, and samples the first token that is none."""

    @override
    def forward(
        self,
        metadata: Any,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: Any,
    ) -> Any:
        """Symptom: under any speculation, a request with ``logprob_token_ids`` gets
        logprobs for its first token only; beside one with ``logprobs``, the engine dies
        ("shape mismatch"). Of seeds: see ``rejection_sample``.

        Reason: vLLM gathers them for the token after the last draft, where it then
        looks for all logits, and for no other. Remove when it gathers them for all.
        """
        num_drafts = metadata.num_draft_tokens
        with gathering(self.sampler, sampling_metadata, len(num_drafts)) as changed:
            changed = past_drafts(
                self.sampler.topk_topp_sampler, num_drafts, logits, changed
            )
            return super().forward(metadata, draft_probs, logits, changed)

    @override
    def apply_logits_processors(
        self, logits: Tensor, sampling_metadata: Any, metadata: Any
    ) -> Tensor:
        """Symptom: ``logit_bias`` and ``min_p`` are without effect on drafts; thinking
        budgets as in ``DraftingSampler``.

        Reason: verification applies neither. ``min_p`` is due after the temperature;
        what it leaves out is decided here, and the temperature is applied again. Remove
        when verification applies both.
        """
        ends = list(accumulate(metadata.num_draft_tokens, initial=0))
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor):
                for row, biases in processor.biases.items():
                    added = logits.new_tensor(list(biases.values()))
                    logits[ends[row] : ends[row + 1], list(biases)] += added
        logits = super().apply_logits_processors(
            logits, without_holder(sampling_metadata), metadata
        )
        for row, drafts, each in thinking(sampling_metadata):
            positions = range(ends[row], ends[row + 1])
            for position, state in zip(positions, each.states(drafts), strict=False):
                each.force(state, logits[position : position + 1])
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            is_due = isinstance(processor, MinPLogitsProcessor) and len(logits)
            if is_due and processor.min_p_count and not sampling_metadata.all_greedy:
                places = metadata.cu_num_draft_tokens, len(logits)
                expand = rejection_sampler.expand_batch_to_tokens
                of_drafts = copy(processor)
                of_drafts.min_p = expand(processor.min_p[:, 0], *places)[:, None]
                # Greedy requests have 0 there, by which nothing can be divided.
                temperature = expand(sampling_metadata.temperature, *places, 0, 1)
                left = of_drafts.apply(logits / temperature[:, None])
                logits.masked_fill_(left.isneginf(), -torch.inf)
        return logits


@torch.inference_mode()
def verify_all_kinds(
    verify: Any, metadata: Any, logits: Tensor, sampling_metadata: Any
) -> None:
    """Verifies dummy drafts with and without probabilities, greedily and not.

    Args:
        verify: vLLM's rejection sampler; the rest is what it was given by a dummy run.
    """
    num_drafts = sum(metadata.num_draft_tokens)
    drawn_from = torch.full_like(
        logits[:num_drafts], 1 / logits.shape[1], dtype=torch.float32
    )
    # Batches have it in this type, which the dummy run forgets.
    top_k = sampling_metadata.top_k.to(torch.int32)
    drawn = replace(sampling_metadata, top_k=top_k)
    greedy = replace(drawn, all_greedy=True, all_random=False, temperature=None)
    for given in (None, drawn_from):
        for sampling in (drawn, greedy):
            verify(metadata, given, logits, sampling)
