"""Statistics of drafting travel with vLLM's own, from the worker to the front end."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch

from vllm_budgetdraft.vllm_integration.metrics.statistics import KEY, DraftStatistics
from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method

#: Of a ModelRunnerOutput, what the worker took; of a Scheduler, what came so far.
ATTRIBUTE = "budgetdraft_statistics"


def apply(config_class: type) -> None:
    """Patches the engine core and the front end, wherever the config is known.

    Args:
        config_class: of the speculative configs that are ours.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.loggers import StatLoggerManager

    def forward(original: Function) -> Function:
        """The third part of ``_send``: in the one dict of SchedulerStats that is open.

        Front ends decode the rest by its types, and leave out what those do not have.
        """

        def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
            stats = original(self, *args, **kwargs)
            if isinstance(self.vllm_config.speculative_config, config_class):
                ours = statistics_of(self).take()
                if stats is not None:
                    carried = stats.kv_connector_stats or {}
                    stats.kv_connector_stats = {**carried, KEY: ours}
            return stats

        return make_stats

    def show(original: Function) -> Function:
        """The last part of ``_send``: one more logger, before vLLM's.

        The entry point ``vllm.stat_logger_plugins`` would switch statistics on for
        everybody who has this package installed.
        """

        def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if isinstance(vllm_config.speculative_config, config_class):
                from vllm_budgetdraft.vllm_integration.metrics.prometheus import (
                    BudgetDraftStatLogger,
                )

                ours = BudgetDraftStatLogger(vllm_config, self.engine_indexes)
                self.stat_loggers.insert(0, ours)

        return initialise

    wrap_method(Scheduler, "update_from_output", _collect)
    wrap_method(Scheduler, "make_stats", forward)
    wrap_method(StatLoggerManager, "__init__", show)


def apply_to_worker() -> None:
    """Patches the worker. Call it there, where its class is loaded."""
    from vllm.v1.worker.gpu_worker import Worker

    wrap_method(Worker, "sample_tokens", _send)
    wrap_method(Worker, "execute_model", _release_when_idle)


def statistics_of(scheduler: Any) -> DraftStatistics:
    """What a scheduler has been told of, and tells the front end with its next step."""
    return vars(scheduler).setdefault(ATTRIBUTE, DraftStatistics())


def _send(original: Function) -> Function:
    """Symptom: what drafting did stays in the worker, where nobody sees it.

    Reason: neither the output of a step nor vLLM's statistics have a place for what a
    proposer counts, and the process that answers ``/metrics`` is another one. Remove
    when they have.
    """
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        proposer = proposer_of(self)
        if proposer is None or output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:
            return output
        taken = _taken(proposer)
        if isinstance(output, AsyncModelRunnerOutput):
            output.get_output = _with_attribute(output.get_output, taken)
        else:
            setattr(output, ATTRIBUTE, taken)
        return output

    return sample_tokens


def _release_when_idle(original: Function) -> Function:
    """Symptom: after a server's last request its pages stay in use, and are shown so.

    Reason: vLLM tells the worker of it in a step without tokens, in which no proposer
    is called. Remove when a proposer is told of requests that are over.
    """

    @torch.inference_mode()
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        output = original(self, scheduler_output)
        proposer = proposer_of(self)
        if proposer is not None and not scheduler_output.total_num_scheduled_tokens:
            output = copy(output)  # of the one that vLLM has for all such steps
            setattr(output, ATTRIBUTE, _taken(proposer, is_idle=True))
        return output

    return execute_model


def proposer_of(worker: Any) -> Any:
    """The worker's, or None if it is not ours."""
    runner = worker.model_runner
    proposer = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    return proposer if hasattr(proposer, "take_statistics") else None


def _taken(proposer: Any, is_idle: bool = False) -> Any:
    """What it did; a failure in saying so must not end generation."""
    try:
        if is_idle:
            proposer.release_ended()
        return proposer.take_statistics()
    except Exception as error:
        statistics = DraftStatistics()
        statistics.count("draft_faults", label=type(error).__name__)
        return statistics.take()


def _with_attribute(get_output: Callable[[], Any], taken: Any) -> Callable[[], Any]:
    def get() -> Any:
        output = get_output()
        setattr(output, ATTRIBUTE, taken)
        return output

    return get


def _collect(original: Function) -> Function:
    """The second part of ``_send``: at the scheduler, where statistics are made."""

    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any
    ) -> Any:
        taken = getattr(model_runner_output, ATTRIBUTE, None)
        if taken is not None:
            statistics_of(self).add(taken)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output
