"""Model runner V1: what the "custom_class" contract leaves out."""

import inspect
from typing import Any

import torch

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method
from vllm_budgetdraft.vllm_integration.remembering import tell_scopes

#: Has the target tell what its layers think.
ASKS_FOR_STATES = "_setup_eagle3_aux_hidden_state_outputs"


def can_ask_for_states() -> bool:
    """Whether this vLLM has a place where a target is asked what its layers think."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return hasattr(GPUModelRunner, ASKS_FOR_STATES)


def apply(proposer_class: type) -> None:
    """Patches the runner class. Call it in the worker, where that class is loaded."""
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_budgetdraft.vllm_integration.patches import (
        logprobs,
        rejection_sampler,
        thinking_budget,
    )

    def ours(runner: Any) -> Any:
        drafter = getattr(runner, "drafter", None)
        return drafter if isinstance(drafter, proposer_class) else None

    def bind_runner(original: Function) -> Function:
        """Symptom: ``propose`` cannot tell which request a row is, and verification
        takes drawn drafts for certain ones, so that it accepts few.

        Reason: "custom_class" hands over rows, and rows move; it has no way to hand
        back probabilities. Remove when the contract has both.
        """

        signature = inspect.signature(original)

        def propose_draft_token_ids(
            self: Any, scheduler_output: Any, *args: Any, **kwargs: Any
        ) -> Any:
            drafter = ours(self)
            if drafter is None:
                return original(self, scheduler_output, *args, **kwargs)
            states = None
            if drafter.reads_features:
                given = signature.bind(self, scheduler_output, *args, **kwargs)
                states = given.arguments["aux_hidden_states"]
            tell_scopes(self.requests, scheduler_output.scheduled_new_reqs)
            drafter.bind(
                self,
                scheduler_output.scheduled_spec_decode_tokens,
                scheduler_output.num_scheduled_tokens,
                states,
            )
            drafts = original(self, scheduler_output, *args, **kwargs)
            if taken := drafter.take_probabilities():
                self._draft_prob_req_ids, self._draft_probs = taken
            return drafts

        return propose_draft_token_ids

    def sample_without_drafts(original: Function) -> Function:
        """Symptom: a step without drafts takes longer than without speculation, and on
        a CPU one with top_k fails ("max(): Expected reduction dim").

        Reason: newer vLLM verifies none as it verifies some. Remove when it samples as
        without speculation then.
        """

        def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
            if (
                ours(self)
                and spec_decode_metadata is not None
                and not any(spec_decode_metadata.num_draft_tokens)
            ):
                spec_decode_metadata = None
            return original(self, logits, spec_decode_metadata)

        return _sample

    def prepare_without_drafts(original: Function) -> Function:
        """The other half of ``sample_without_drafts``: indices that nobody will use."""
        from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

        def _calc_spec_decode_metadata(
            self: Any, num_draft_tokens: Any, cu_num_scheduled_tokens: Any
        ) -> Any:
            if ours(self) is None or num_draft_tokens.any():
                return original(self, num_draft_tokens, cu_num_scheduled_tokens)
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

        return _calc_spec_decode_metadata

    def keep_noise_while_prefilling(original: Function) -> Function:
        """Symptom: on a CPU, a request with a seed whose prompt is prefilled in parts
        ends the engine ("CPU Generator does not use offset").

        Reason: what is sampled before a prompt's end is thrown away, and its noise
        taken back by a call that only CUDA's generators have. Such rows now sample
        without their generators. Remove when vLLM takes noise back on a CPU.
        """

        def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
            hidden: dict[int, Any] = {}
            generators = self.input_batch.generators
            if generators and ours(self) and not is_gpu(self.device):
                prefills = self.discard_request_mask.np
                hidden = {row: generators[row] for row in generators if prefills[row]}
            for row in hidden:
                del generators[row]
            try:
                return original(self, *args, **kwargs)
            finally:
                generators.update(hidden)

        return sample_tokens

    def ask_for_states(original: Function) -> Function:
        """Symptom: an EAGLE-3 head has nothing to read.

        Reason: "custom_class" has no way to ask for what the target thinks, which vLLM
        has for its own heads. Remove when the contract has one.
        """

        def _setup_eagle3_aux_hidden_state_outputs(self: Any) -> None:
            drafter = ours(self)
            if drafter is not None and drafter.reads_features:
                self.use_aux_hidden_state_outputs = True
            original(self)
            if drafter is not None and drafter.reads_features and drafter.aux_layers:
                self.model.set_aux_hidden_state_layers(tuple(drafter.aux_layers))

        return _setup_eagle3_aux_hidden_state_outputs

    def build_every_processor(original: Function) -> Function:
        """Symptom, reason and removal: see ``rejection_sampler._apply_logit_bias``."""
        from vllm.v1.sample.logits_processor import (
            BUILTIN_LOGITS_PROCESSORS,
            LogitsProcessors,
        )

        from vllm_budgetdraft.vllm_integration.speculative_config import (
            BudgetDraftSpeculativeConfig,
        )

        def build_logitsprocs(
            vllm_config: Any,
            device: Any,
            is_pin_memory: bool,
            is_pooling_model: bool,
            custom_logitsprocs: Any = (),
        ) -> Any:
            config = vllm_config.speculative_config
            if custom_logitsprocs or not isinstance(
                config, BudgetDraftSpeculativeConfig
            ):
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

    def per_request_limit(original: Function) -> Function:
        """Symptom: one request near ``max_model_len`` ends drafting for its batch.

        Reason: the length gate looks at the longest request, and then has token 0
        verified as everybody's drafts (vLLM issue 58080). Our proposer limits each
        request by itself. Remove when that issue is fixed.
        """

        def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
            if ours(self):
                return common_attn_metadata is not None
            return original(self, common_attn_metadata)

        return _input_fits_in_drafter

    def profile_drafter(original: Function) -> Function:
        """Symptom: a drafter's activations are missing from vLLM's memory profile.

        Reason: dummy runs never call a "custom_class" proposer. Remove when they do.
        """

        def profile_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if drafter := ours(self):
                drafter.profile_run()
            return original(self, *args, **kwargs)

        return profile_run

    def verify_all_kinds(original: Function) -> Function:
        """Symptom: the first drafts of a server wait for kernels of vLLM's rejection
        sampler to be compiled (its JIT monitor warns of three).

        Reason: the dummy run verifies as if no drafter told its probabilities, and in
        older versions no batch that is greedy as a whole. Remove when it verifies with
        and without both.
        """

        def _dummy_sampler_run(self: Any, hidden_states: Any) -> Any:
            if not ours(self):
                return original(self, hidden_states)
            verify, calls = self.rejection_sampler, []

            def note(*arguments: Any) -> Any:
                calls.append(arguments)
                return verify(*arguments)

            self.rejection_sampler = note
            try:
                result = original(self, hidden_states)
            finally:
                self.rejection_sampler = verify
            if calls:
                metadata, _, logits, sampling_metadata = calls[0]
                rejection_sampler.verify_all_kinds(
                    verify, metadata, logits, sampling_metadata
                )
            return result

        return _dummy_sampler_run

    wrap_method(GPUModelRunner, "propose_draft_token_ids", bind_runner)
    if hasattr(GPUModelRunner, ASKS_FOR_STATES):  # which heads alone need
        wrap_method(
            GPUModelRunner, "_setup_eagle3_aux_hidden_state_outputs", ask_for_states
        )
    wrap_method(GPUModelRunner, "_input_fits_in_drafter", per_request_limit)
    wrap_method(GPUModelRunner, "profile_run", profile_drafter)
    wrap_method(GPUModelRunner, "_dummy_sampler_run", verify_all_kinds)
    wrap_method(GPUModelRunner, "_sample", sample_without_drafts)
    wrap_method(GPUModelRunner, "sample_tokens", keep_noise_while_prefilling)
    wrap_method(GPUModelRunner, "_calc_spec_decode_metadata", prepare_without_drafts)
    wrap_method(gpu_model_runner, "build_logitsprocs", build_every_processor)
    rejection_sampler.apply()
    thinking_budget.apply()
    logprobs.apply()
