"""Model runner V1: what vLLM's "custom_class" contract leaves out."""

import inspect
from typing import Any

import torch
from typing_extensions import override
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_budgetdraft.vllm_integration.patching import specialise
from vllm_budgetdraft.vllm_integration.remembering import tell_scopes
from vllm_budgetdraft.vllm_integration.v1.samplers import (
    DraftingSampler,
    DraftVerifier,
    verify_all_kinds,
)

PROPOSE = inspect.signature(GPUModelRunner.propose_draft_token_ids)


class DraftingRunner(GPUModelRunner):
    """A runner whose ``drafter`` is a ``BudgetDraftProposer``."""

    rejection_sampler: Any

    @override
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Makes the samplers ours, see ``v1/samplers.py``."""
        specialise(self.sampler, DraftingSampler)
        specialise(self.rejection_sampler, DraftVerifier)
        super().load_model(*args, **kwargs)

    @override
    def propose_draft_token_ids(
        self, scheduler_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Symptom: ``propose`` cannot tell which request a row is, and verification
        takes drawn drafts for certain ones, so that it accepts few.

        Reason: "custom_class" hands over rows, and rows move; it has no way to hand
        back probabilities. Remove when the contract has both.
        """
        drafter, states = self.drafter, None
        if drafter.reads_features:
            given = PROPOSE.bind(self, scheduler_output, *args, **kwargs)
            states = given.arguments["aux_hidden_states"]
        tell_scopes(self.requests, scheduler_output.scheduled_new_reqs)
        drafter.bind(
            self,
            scheduler_output.scheduled_spec_decode_tokens,
            scheduler_output.num_scheduled_tokens,
            states,
        )
        drafts = super().propose_draft_token_ids(scheduler_output, *args, **kwargs)
        if taken := drafter.take_probabilities():
            self._draft_prob_req_ids, self._draft_probs = taken
        return drafts

    @override
    def _setup_eagle3_aux_hidden_state_outputs(self) -> None:
        """Symptom: an EAGLE-3 head has nothing to read.

        Reason: "custom_class" has no way to ask for what the target thinks, which vLLM
        has for its own heads. Remove when the contract has one.
        """
        if self.drafter.reads_features:
            self.use_aux_hidden_state_outputs = True
        super()._setup_eagle3_aux_hidden_state_outputs()
        if self.drafter.reads_features and self.drafter.aux_layers:
            self.model.set_aux_hidden_state_layers(tuple(self.drafter.aux_layers))

    @override
    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        """Symptom: a step without drafts takes longer than without speculation, and on
        a CPU one with top_k fails ("max(): Expected reduction dim").

        Reason: newer vLLM verifies none as it verifies some. Remove when it samples as
        without speculation then.
        """
        metadata = spec_decode_metadata
        if metadata is not None and not any(metadata.num_draft_tokens):
            metadata = None
        return super()._sample(logits, metadata)

    @override
    def _calc_spec_decode_metadata(
        self, num_draft_tokens: Any, cu_num_scheduled_tokens: Any
    ) -> Any:
        """The other half of ``_sample``: indices that nobody will use."""
        if num_draft_tokens.any():
            return super()._calc_spec_decode_metadata(
                num_draft_tokens, cu_num_scheduled_tokens
            )
        last = torch.from_numpy(cu_num_scheduled_tokens - 1).to(self.device)
        return SpecDecodeMetadata(
            draft_token_ids=last[:0],
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=last[:0],
            cu_num_sampled_tokens=last[:0],
            target_logits_indices=last[:0],
            bonus_logits_indices=last[:0],
            logits_indices=last,
        )

    @override
    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Symptom: one request near ``max_model_len`` ends drafting for its batch.

        Reason: the length gate looks at the longest request, and then has token 0
        verified as everybody's drafts (vLLM issue 58080). Our proposer limits each
        request by itself. Remove when that issue is fixed.
        """
        return common_attn_metadata is not None

    @override
    def profile_run(self, *args: Any, **kwargs: Any) -> Any:
        """Symptom: a drafter's activations are missing from vLLM's memory profile.

        Reason: dummy runs never call a "custom_class" proposer. Remove when they do.
        """
        self.drafter.profile_run()
        return super().profile_run(*args, **kwargs)

    @override
    def _dummy_sampler_run(self, hidden_states: Any) -> Any:
        """Symptom: the first drafts of a server wait for kernels of vLLM's rejection
        sampler to be compiled (its JIT monitor warns of three).

        Reason: the dummy run verifies as if no drafter told its probabilities, and in
        older versions no batch that is greedy as a whole. Remove when it verifies with
        and without both.
        """
        verify, calls = self.rejection_sampler, []

        def note(*arguments: Any) -> Any:
            calls.append(arguments)
            return verify(*arguments)

        self.rejection_sampler = note
        try:
            result = super()._dummy_sampler_run(hidden_states)
        finally:
            self.rejection_sampler = verify
        if calls:
            metadata, _, logits, sampling_metadata = calls[0]
            verify_all_kinds(verify, metadata, logits, sampling_metadata)
        return result
