"""vLLM's scheduler where drafts are ours: how many, what became of them, for whom."""

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_budgetdraft.vllm_integration.metrics.statistics import (
    KEY,
    STATISTICS,
    STEP_COSTS,
    DraftStatistics,
)
from vllm_budgetdraft.vllm_integration.remembering import ATTRIBUTE, Told
from vllm_budgetdraft.vllm_integration.sampling import most_drafts
from vllm_budgetdraft.vllm_integration.v2.adaptive_schedule import AdaptiveSchedule

#: Of vLLM's object for a request, most drafts that it may have.
MOST_DRAFTS = "budgetdraft_most_drafts"


@dataclass
class DraftingState:
    """What a ``DraftScheduler`` knows of drafting.

    Attributes:
        settings: of the engine.
        statistics: what workers have told and the front end was not told yet.
        adaptive: None where the scheduler does not adapt lengths.
        num_resets: how often the prefix cache was reset.
    """

    settings: Any
    statistics: DraftStatistics = field(default_factory=DraftStatistics)
    adaptive: AdaptiveSchedule | None = None
    num_resets: int = 0


class DraftScheduler(Scheduler):
    """A scheduler that knows of drafts, and tells workers who may share contexts."""

    budgetdraft: DraftingState

    def begin_drafting(self) -> None:
        """To be called when vLLM's scheduler is there.

        Symptom: with ``adaptive_draft_length``, model runner V2 verifies ever the same
        number.

        Reason: the scheduler says how many drafts each step has, before the speculator
        runs, from a table by batch size. Ours is one that learns. Remove when a
        speculator can say it.
        """
        settings = self.vllm_config.speculative_config.settings
        self.budgetdraft = known = DraftingState(settings)
        is_v2 = getattr(self.vllm_config, "use_v2_model_runner", False)
        if is_v2 and settings.adaptive_draft_length:
            known.adaptive = AdaptiveSchedule(self, settings, known.statistics)
            self.dynamic_sd_lookup = known.adaptive

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Symptom: a request that asked for fewer drafts, or for none, or whose prompt
        of embeddings allows none, has as many verified as all others. Requests with
        another ``cache_salt``, or from before a ``reset_prefix_cache``, would share
        what the drafter keeps of contexts.

        Reason: model runner V2 drafts one number for a batch, and as many are planned
        for each request; a worker is told of neither salts nor resets. Remove when a
        request can have a number of its own, and workers are told.
        """
        for request in self.running:
            limit = getattr(request, MOST_DRAFTS, None)
            if limit is None:
                limit = most_drafts(request, self.budgetdraft.settings)
                setattr(request, MOST_DRAFTS, limit)
            if len(request.spec_token_ids) > limit:
                request.spec_token_ids = request.spec_token_ids[:limit]
        output = super().schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            salt = self.requests[new.req_id].cache_salt
            num_resets = self.budgetdraft.num_resets
            told = Told(salt, num_resets, new.num_computed_tokens)
            setattr(new, ATTRIBUTE, told)
        return output

    @override
    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Counts resets, which ``schedule`` tells workers."""
        self.budgetdraft.num_resets += 1
        return super().reset_prefix_cache(*args, **kwargs)

    @override
    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> Any:
        """Takes what ``worker.DraftWorker`` sent, and learns what was accepted."""
        adaptive = self.budgetdraft.adaptive
        taken = getattr(model_runner_output, STATISTICS, None)
        if taken is not None:
            self.budgetdraft.statistics.add(taken)
        if adaptive is not None:
            if taken and STEP_COSTS in taken:
                adaptive.use_costs(taken[STEP_COSTS])
            if model_runner_output.sampled_token_ids:
                rows = zip(
                    model_runner_output.req_ids,
                    model_runner_output.sampled_token_ids,
                    strict=True,
                )
                adaptive.record(
                    scheduler_output.scheduled_spec_decode_tokens,
                    {request_id: len(tokens) for request_id, tokens in rows},
                )
        return super().update_from_output(scheduler_output, model_runner_output)

    @override
    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Sends statistics on, in the one dict of SchedulerStats that is open.

        Front ends decode the rest by its types, and leave out what those do not have.
        """
        stats = super().make_stats(*args, **kwargs)
        ours = self.budgetdraft.statistics.take()
        if stats is not None:
            carried = stats.kv_connector_stats or {}
            stats.kv_connector_stats = {**carried, KEY: ours}
        return stats
