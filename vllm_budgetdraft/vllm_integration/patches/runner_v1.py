"""Model runner V1: what the "custom_class" contract leaves out."""

from collections.abc import Callable
from typing import Any

from vllm_budgetdraft.vllm_integration.patching import wrap_method


def apply(proposer_class: type) -> None:
    """Patches the runner class. Call it in the worker, where that class is loaded."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def ours(runner: Any) -> Any:
        drafter = getattr(runner, "drafter", None)
        return drafter if isinstance(drafter, proposer_class) else None

    def bind_runner(original: Callable) -> Callable:
        """Symptom: ``propose`` cannot tell which request a row is.

        Reason: "custom_class" hands over rows, and rows move. Remove when the contract
        names the requests.
        """

        def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
            if drafter := ours(self):
                drafter.bind(self)
            return original(self, *args, **kwargs)

        return propose_draft_token_ids

    def per_request_limit(original: Callable) -> Callable:
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

    def profile_drafter(original: Callable) -> Callable:
        """Symptom: a drafter's activations are missing from vLLM's memory profile.

        Reason: dummy runs never call a "custom_class" proposer. Remove when they do.
        """

        def profile_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if drafter := ours(self):
                drafter.profile_run()
            return original(self, *args, **kwargs)

        return profile_run

    wrap_method(GPUModelRunner, "propose_draft_token_ids", bind_runner)
    wrap_method(GPUModelRunner, "_input_fits_in_drafter", per_request_limit)
    wrap_method(GPUModelRunner, "profile_run", profile_drafter)
