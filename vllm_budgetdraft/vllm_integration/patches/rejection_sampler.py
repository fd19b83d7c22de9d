"""Verification of sampled tokens: what vLLM's rejection sampler gets wrong."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Generator, Tensor

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method

#: Where vLLM expects no token.
NO_TOKEN = -1


def apply() -> None:
    """Patches the module and its class. Call it in the worker."""
    from vllm.v1.sample import rejection_sampler

    sampler = rejection_sampler.RejectionSampler
    wrap_method(rejection_sampler, "expand_batch_to_tokens", _expand_every_type)
    wrap_method(sampler, "apply_logits_processors", _apply_logit_bias)
    wrap_method(rejection_sampler, "apply_sampling_constraints", _apply_min_p)
    wrap_method(sampler, "forward", _keep_noise_in_order)
    wrap_method(
        rejection_sampler,
        "rejection_sample",
        lambda original: _follow_the_seed(_take_placeholders_for_drafts(original)),
    )


@torch.inference_mode()
def verify_all_kinds(
    verify: Callable[..., Any], metadata: Any, logits: Tensor, sampling_metadata: Any
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


def _expand_every_type(original: Function) -> Function:
    """Symptom: on a CPU, output at temperatures above 0 has another distribution under
    any speculation (vLLM issue 55005).

    Reason: temperatures, top_p and top_k of each draft are written to a copy that is
    thrown away. Remove when that issue is fixed.
    """

    def expand_batch_to_tokens(
        x: Tensor,
        cu_num_tokens: Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> Tensor:
        if is_gpu(x.device):
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        expanded = x.repeat_interleave(counts, output_size=num_tokens)
        return expanded.masked_fill(expanded == replace_from, replace_to)

    return expand_batch_to_tokens


def _apply_logit_bias(original: Function) -> Function:
    """Symptom: logit_bias is refused under any speculation, or without effect.

    Reason: vLLM builds no processor for it then, and verification applies none. See
    also ``runner_v1.build_every_processor``. Remove both when it does.
    """
    from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor

    def apply_logits_processors(
        self: Any, logits: Tensor, sampling_metadata: Any, metadata: Any
    ) -> Tensor:
        ends = list(accumulate(metadata.num_draft_tokens, initial=0))
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor):
                for row, biases in processor.biases.items():
                    added = logits.new_tensor(list(biases.values()))
                    logits[ends[row] : ends[row + 1], list(biases)] += added
        return original(self, logits, sampling_metadata, metadata)

    return apply_logits_processors


def _apply_min_p(original: Function) -> Function:
    """Symptom, reason and removal: as of logit_bias, for min_p.

    It is due after the temperature, and before top_k and top_p.
    """
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.logits_processor import MinPLogitsProcessor

    def apply_sampling_constraints(
        logits: Tensor, cu_num_draft_tokens: Tensor, sampling_metadata: Any
    ) -> Tensor:
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            is_due = isinstance(processor, MinPLogitsProcessor) and len(logits)
            if is_due and processor.min_p_count and not sampling_metadata.all_greedy:
                scaled = replace(sampling_metadata, top_k=None, top_p=None)
                logits = original(logits, cu_num_draft_tokens, scaled)
                of_drafts = copy(processor)
                of_drafts.min_p = rejection_sampler.expand_batch_to_tokens(
                    processor.min_p[:, 0], cu_num_draft_tokens, len(logits)
                )[:, None]
                logits = of_drafts.apply(logits)
                ones = torch.ones_like(sampling_metadata.temperature)
                sampling_metadata = replace(sampling_metadata, temperature=ones)
        return original(logits, cu_num_draft_tokens, sampling_metadata)

    return apply_sampling_constraints


class _SeededRows(dict[int, Generator]):
    """A batch's generators by row; those of rows with drafts stand past their drafts.

    Attributes:
        before: of those rows, the state before the drafts.
    """

    before: dict[int, Tensor]
    draw: Callable[[Tensor, Generator], Tensor]


def _keep_noise_in_order(original: Function) -> Function:
    """The first half of ``_follow_the_seed``.

    The token after the last draft is sampled before the drafts are verified. With the
    generators past the drafts it gets the noise that it gets without speculation.
    """

    def forward(
        self: Any,
        metadata: Any,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: Any,
    ) -> Any:
        counts, generators = metadata.num_draft_tokens, sampling_metadata.generators
        if any(counts[row] for row in generators):
            rows = _SeededRows(generators)
            rows.draw = _Draw(self.sampler.topk_topp_sampler)
            rows.before = {}
            for row, generator in generators.items():
                if counts[row]:
                    rows.before[row] = generator.get_state()
                    rows.draw(logits.new_zeros(counts[row], logits.shape[1]), generator)
            sampling_metadata = replace(sampling_metadata, generators=rows)
        return original(self, metadata, draft_probs, logits, sampling_metadata)

    return forward


@dataclass(frozen=True)
class _Draw:
    """vLLM's own sampler, with one request's noise."""

    sampler: Any

    def __call__(self, logits: Tensor, generator: Generator) -> Tensor:
        """Samples tokens [n] of logits [n, V], one after the other."""
        generators = dict.fromkeys(range(len(logits)), generator)
        tokens, _ = self.sampler(logits.clone(), generators, None, None)
        return tokens


def _take_placeholders_for_drafts(original: Function) -> Function:
    """Symptom: on a CPU, the first token after a prompt of one token has another
    distribution if others are decoding.

    Reason: the scheduler pads such a prompt with drafts of -1, which the model is given
    as 0 and GPUs reject; the CPU kernels look for them beside the row. Remove when they
    reject them.
    """

    def rejection_sample(
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if not is_gpu(draft_token_ids.device) and (draft_token_ids < 0).any():
            # Drafts without probabilities are exact whatever they are.
            draft_token_ids, draft_probs = draft_token_ids.clamp(min=0), None
        return original(
            draft_token_ids,
            num_draft_tokens,
            max_spec_len,
            cu_num_draft_tokens,
            draft_probs,
            *args,
            **kwargs,
        )

    return rejection_sample


def _follow_the_seed(original: Function) -> Function:
    """Symptom: a request's seed does not give the output that it gives without
    speculation; what it gives changes with the drafts, and so with the batch.

    Reason: rejection sampling takes a request's noise for other purposes, and more of
    it the more is drafted. Here a seeded request's tokens are sampled one by one, each
    with the noise of its turn, and drafts are accepted as far as they are the same.
    Remove when vLLM's noise is a function of seed and position.
    """

    def rejection_sample(
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_logits: Tensor,
        bonus_token_ids: Tensor,
        sampling_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        seeded = sampling_metadata.generators
        if isinstance(seeded, _SeededRows):
            sampling_metadata = replace(sampling_metadata, generators={})
        output = original(
            draft_token_ids,
            num_draft_tokens,
            max_spec_len,
            cu_num_draft_tokens,
            draft_probs,
            target_logits,
            bonus_token_ids,
            sampling_metadata,
            *args,
            **kwargs,
        )
        if isinstance(seeded, _SeededRows):
            ends = list(accumulate(num_draft_tokens))
            vocab_size = target_logits.shape[1]
            for row, state in seeded.before.items():
                drafts = slice(ends[row] - num_draft_tokens[row], ends[row])
                generator = seeded[row]
                generator.set_state(state)
                sampled = seeded.draw(target_logits[drafts], generator)
                tokens = torch.cat([sampled, bonus_token_ids[row]])
                same = sampled == draft_token_ids[drafts]
                num_emitted = 1 + int(same.cumprod(0).sum())
                output[row] = NO_TOKEN
                output[row, :num_emitted] = tokens[:num_emitted]
                generator.set_state(state)
                seeded.draw(target_logits.new_zeros(num_emitted, vocab_size), generator)
        return output

    return rejection_sample
