"""vLLM's worker where drafts are ours: it tells the engine's core of them."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from typing_extensions import override
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_budgetdraft.vllm_integration.metrics.statistics import (
    STATISTICS,
    DraftStatistics,
)
from vllm_budgetdraft.vllm_integration.patching import specialise


class DraftWorker(Worker):
    """A worker whose runner drafts by this package."""

    @override
    def compile_or_warm_up_model(self) -> Any:
        """Symptom: which draft length pays is learnt on users' requests.

        Reason: a proposer is not told when the target can be run as it will be, with
        everything compiled and captured. Remove when it is.
        """
        times = super().compile_or_warm_up_model()
        _proposer_of(self).time_steps(self.model_runner)
        return times

    @override
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Symptom: what drafting did stays in the worker, where nobody sees it.

        Reason: neither the output of a step nor vLLM's statistics have a place for what
        a proposer counts, and the process that answers ``/metrics`` is another one. So
        it goes along with the output, to ``scheduler.DraftScheduler``, with vLLM's
        statistics to the front end, and there to a logger of ours. Remove when there is
        a place.
        """
        output = super().sample_tokens(*args, **kwargs)
        if output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:
            return output
        taken = _taken(self)
        if isinstance(output, AsyncModelRunnerOutput):
            output.get_output = _with_statistics(output.get_output, taken)
        else:
            setattr(output, STATISTICS, taken)
        return output

    @override
    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        """Symptom: after a server's last request its pages stay in use, and are shown
        so.

        Reason: vLLM tells the worker of it in a step without tokens, in which no
        proposer is called. Remove when a proposer is told of requests that are over.
        """
        output = super().execute_model(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            output = copy(output)  # vLLM has one object for all such steps
            setattr(output, STATISTICS, _taken(self, is_idle=True))
        return output


def make_ours(worker: Any) -> None:
    """Makes a worker a ``DraftWorker``, and its runner a runner that drafts.

    To be called before the runner loads anything.
    """
    specialise(worker, DraftWorker)
    if hasattr(worker.model_runner, "speculator"):
        from vllm_budgetdraft.vllm_integration.v2 import runner as v2

        specialise(worker.model_runner, v2.DraftingRunner)
    else:
        from vllm_budgetdraft.vllm_integration.v1 import runner as v1

        specialise(worker.model_runner, v1.DraftingRunner)


def _proposer_of(worker: Any) -> Any:
    runner = worker.model_runner
    return getattr(runner, "speculator", None) or runner.drafter


def _taken(worker: Any, is_idle: bool = False) -> Any:
    """Statistics since the last call; that they fail must not end generation."""
    try:
        proposer = _proposer_of(worker)
        if is_idle:
            proposer.release_ended()
        return proposer.take_statistics()
    except Exception as error:
        statistics = DraftStatistics()
        statistics.count("draft_faults", label=type(error).__name__)
        return statistics.take()


def _with_statistics(get_output: Callable[[], Any], taken: Any) -> Callable[[], Any]:
    def get() -> Any:
        output = get_output()
        setattr(output, STATISTICS, taken)
        return output

    return get
