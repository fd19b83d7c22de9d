"""The worker: what it loads becomes ours, and what verifies drafts is mended."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.vllm_integration.patching import Function, is_ours


def make_our_worker(original: Function) -> Function:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        if is_ours(self.vllm_config.speculative_config):
            from vllm_budgetdraft.vllm_integration.worker import make_ours

            make_ours(self)
        original(self, *args, **kwargs)

    return load_model


def build_every_processor(original: Function) -> Function:
    from vllm.v1.sample.logits_processor import (
        BUILTIN_LOGITS_PROCESSORS,
        LogitsProcessors,
    )

    def build_logitsprocs(
        vllm_config: Any,
        device: Any,
        is_pin_memory: bool,
        is_pooling_model: bool,
        custom_logitsprocs: Any = (),
    ) -> Any:
        if custom_logitsprocs or not is_ours(vllm_config.speculative_config):
            return original(
                vllm_config,
                device,
                is_pin_memory,
                is_pooling_model,
                custom_logitsprocs,
            )
        return LogitsProcessors(
            processor(vllm_config, device, is_pin_memory)
            for processor in BUILTIN_LOGITS_PROCESSORS
        )

    return build_logitsprocs


def expand_every_type(original: Function) -> Function:
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


def verify_seeded_and_padded(original: Function) -> Function:
    from vllm_budgetdraft.vllm_integration.v1.seeds import SeededRows

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
        seeded, drafts = sampling_metadata.generators, draft_token_ids
        if isinstance(seeded, SeededRows):
            sampling_metadata = replace(sampling_metadata, generators={})
        if not is_gpu(drafts.device) and (drafts < 0).any():
            # To the model these are token 0. Drafts without probabilities are exact
            # whatever they are.
            drafts, draft_probs = drafts.clamp(min=0), None
        output = original(
            drafts,
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
        if isinstance(seeded, SeededRows):
            seeded.sample(
                output,
                draft_token_ids,
                num_draft_tokens,
                target_logits,
                bonus_token_ids,
            )
        return output

    return rejection_sample
