"""Model runner V2: what vLLM does not tell a speculator, or ask it."""

from typing import Any

from typing_extensions import override
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_budgetdraft.vllm_integration.patching import specialise
from vllm_budgetdraft.vllm_integration.v2.samplers import (
    DraftingSampler,
    DraftVerifier,
)


class DraftingRunner(GPUModelRunner):
    """A runner whose ``speculator`` is a ``Speculator`` of ours."""

    @override
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Symptom: an EAGLE-3 head has nothing to read.

        Reason: the runner asks the target for its states by the names of methods.
        Remove when a speculator can ask, and when no method of ``v2.samplers`` is left.
        """
        reads_features = self.speculator.reads_features
        if reads_features:
            self.use_aux_hidden_state_outputs = True
        super().load_model(*args, **kwargs)
        if reads_features and self.speculator.aux_layers:
            self.model.set_aux_hidden_state_layers(tuple(self.speculator.aux_layers))
        specialise(self.sampler, DraftingSampler)
        specialise(self.rejection_sampler, DraftVerifier)

    @override
    def add_requests(self, scheduler_output: Any) -> None:
        """Symptom: a speculator cannot tell a request from another one with its index,
        nor what the request asked for.

        Reason: it is called with a batch, and not when requests come. Remove when it
        is.
        """
        self.speculator.make_way(scheduler_output.scheduled_new_reqs)
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            self.speculator.add_request(request.req_id, request)

    @override
    def prepare_attn(self, input_batch: Any) -> Any:
        """Symptom: mask tokens that go along with verification cannot tell whose tokens
        they follow (``flex_decoding`` "parallel").

        Reason: a speculator is told of a batch after the target's pass. Remove when it
        is told before, too.
        """
        self.speculator.note_batch(input_batch)
        return super().prepare_attn(input_batch)

    @override
    def take_draft_token_ids(self) -> Any:
        """Symptom: of a request that did not draft, its last token is verified,
        repeated; and drafts are verified that the drafter is not confident of.

        Reason: the runner says that every row has drafts, and asks no speculator. Where
        the engine schedules ahead, nobody asks the runner either. Remove when a
        speculator can say how many drafts of each request there are.
        """
        taken = super().take_draft_token_ids()
        config = self.vllm_config
        # With an external launcher each rank has a scheduler, and only one rank drafts.
        launcher = config.parallel_config.distributed_executor_backend
        is_ahead = config.scheduler_config.async_scheduling
        if taken is not None and not is_ahead and launcher != "external_launcher":
            self.speculator.leave_out(taken.req_ids, taken.draft_token_ids)
        return taken
