"""Steps are timed where everything is compiled and captured."""

from typing import Any

from vllm_budgetdraft.vllm_integration.patches import statistics
from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method


def apply_to_worker() -> None:
    """Patches the worker. Call it there, where its class is loaded."""
    from vllm.v1.worker.gpu_worker import Worker

    for worker in (Worker, *Worker.__subclasses__()):
        if "compile_or_warm_up_model" in vars(worker):
            wrap_method(worker, "compile_or_warm_up_model", _time_steps)


def _time_steps(original: Function) -> Function:
    """Symptom: which draft length pays is learnt on users' requests.

    Reason: a proposer is not told when the target can be run as it will be. Remove when
    it is.
    """

    def compile_or_warm_up_model(self: Any) -> Any:
        times = original(self)
        proposer = statistics.proposer_of(self)
        if proposer is not None:
            proposer.time_steps(self.model_runner)
        return times

    return compile_or_warm_up_model
