"""Model runner V2: a speculator that comes from outside."""

from typing import Any

from vllm_budgetdraft.vllm_integration.compatibility import supports_runner_v2
from vllm_budgetdraft.vllm_integration.metrics.statistics import STEP_COSTS
from vllm_budgetdraft.vllm_integration.patches import logprobs, statistics
from vllm_budgetdraft.vllm_integration.patches import start_up as step_timing
from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method

#: Of a scheduler's Request, most drafts that it may have.
ATTRIBUTE = "budgetdraft_most_drafts"


def apply() -> None:
    """Patches what decides for a runner, in every process, before the runner loads."""
    import vllm
    from vllm.config import VllmConfig

    if not supports_runner_v2(vllm.__version__):
        return
    from vllm.v1.worker.gpu import spec_decode

    wrap_method(VllmConfig, "_get_v2_model_runner_unsupported_features", _support_ours)
    wrap_method(spec_decode, "init_speculator", _make_ours)


def _is_ours(vllm_config: Any) -> bool:
    # By name, for the class takes long to import, and most processes are not ours.
    return hasattr(vllm_config.speculative_config, "budgetdraft")


def _support_ours(original: Function) -> Function:
    """Symptom: vLLM chooses model runner V1, which is deprecated.

    Reason: V2 takes no "custom_class"; ours it can take, for ``init_speculator`` does.
    Remove when vLLM lets a plugin register a speculator.
    """

    def _get_v2_model_runner_unsupported_features(self: Any) -> list[str]:
        unsupported = original(self)
        if not _is_ours(self):
            return unsupported
        from vllm_budgetdraft.vllm_integration.speculative_config import only_on_v1

        _patch_scheduler()
        method = "speculative method 'custom_class'"
        others = [feature for feature in unsupported if feature != method]
        return others + only_on_v1(self)

    return _get_v2_model_runner_unsupported_features


def _make_ours(original: Function) -> Function:
    """Symptom: "custom_class is not supported yet".

    Reason and removal: see ``_support_ours``.
    """

    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not _is_ours(vllm_config):
            return original(vllm_config, device, req_states)
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        from vllm_budgetdraft.vllm_integration.v2.adaptive_schedule import every_length
        from vllm_budgetdraft.vllm_integration.v2.feature_speculator import (
            FeatureSpeculator,
        )
        from vllm_budgetdraft.vllm_integration.v2.own_cache_speculator import (
            OwnCacheSpeculator,
        )
        from vllm_budgetdraft.vllm_integration.v2.speculator import Speculator
        from vllm_budgetdraft.vllm_integration.v2.target_speculator import (
            TargetSpeculator,
        )

        config = vllm_config.speculative_config
        if config.settings.adaptive_draft_length:
            # Which lengths the worker captures graphs of verification for.
            config.num_speculative_tokens_per_batch_size = every_length(
                config.num_speculative_tokens
            )
        wrap_method(GPUModelRunner, "load_model", _ask_for_states)
        wrap_method(GPUModelRunner, "add_requests", _announce)
        wrap_method(GPUModelRunner, "take_draft_token_ids", _leave_out)
        statistics.apply_to_worker()
        step_timing.apply_to_worker()
        logprobs.apply_to_runner_v2()
        kind: type[Speculator] = OwnCacheSpeculator
        if config.settings.drafter_type == "eagle3":
            kind = FeatureSpeculator
        elif config.settings.drafter_type == "flexdraft":
            kind = TargetSpeculator
            wrap_method(GPUModelRunner, "prepare_attn", _note_batch)
        return kind(vllm_config, device, req_states)

    return init_speculator


def _ask_for_states(original: Function) -> Function:
    """Symptom: an EAGLE-3 head has nothing to read.

    Reason: the runner asks the target for its states by the names of methods. Remove
    when a speculator can ask.
    """

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        wants = _is_ours(self.vllm_config) and self.speculator is not None
        wants = wants and self.speculator.reads_features
        if wants:
            self.use_aux_hidden_state_outputs = True
        original(self, *args, **kwargs)
        if wants and self.speculator.aux_layers:
            self.model.set_aux_hidden_state_layers(tuple(self.speculator.aux_layers))

    return load_model


def _note_batch(original: Function) -> Function:
    """Symptom: mask tokens that go along with verification cannot tell whose tokens
    they follow (``flex_decoding`` "parallel").

    Reason: a speculator is told of a batch after the target's pass. Remove when it is
    told before, too.
    """

    def prepare_attn(self: Any, input_batch: Any) -> Any:
        if hasattr(self.speculator, "note_batch"):
            self.speculator.note_batch(input_batch)
        return original(self, input_batch)

    return prepare_attn


def _announce(original: Function) -> Function:
    """Symptom: a speculator cannot tell a request from another one with its index, nor
    what the request asked for.

    Reason: it is called with a batch, and not when requests come. Remove when it is.
    """

    def add_requests(self: Any, scheduler_output: Any) -> None:
        is_ours = _is_ours(self.vllm_config) and self.speculator is not None
        if is_ours:
            self.speculator.make_way(scheduler_output.scheduled_new_reqs)
        original(self, scheduler_output)
        if is_ours:
            for request in scheduler_output.scheduled_new_reqs:
                self.speculator.add_request(request.req_id, request)

    return add_requests


def _leave_out(original: Function) -> Function:
    """Symptom: of a request that did not draft, its last token is verified, repeated;
    and drafts are verified that the drafter is not confident of.

    Reason: the runner says that every row has drafts, and asks no speculator. Where the
    engine schedules ahead, nobody asks the runner either. Remove when a speculator can
    say how many drafts of each request there are.
    """

    def take_draft_token_ids(self: Any) -> Any:
        taken = original(self)
        config = self.vllm_config
        if (
            taken is not None
            and _is_ours(config)
            and not config.scheduler_config.async_scheduling
            # Each rank has a scheduler there, and only the first one drafts.
            and config.parallel_config.distributed_executor_backend
            != "external_launcher"
        ):
            self.speculator.leave_out(taken.req_ids, taken.draft_token_ids)
        return taken

    return take_draft_token_ids


def _patch_scheduler() -> None:
    """To be called where the scheduler's class is about to be loaded."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap_method(Scheduler, "schedule", _limit_drafts)
    wrap_method(Scheduler, "__init__", _choose_lengths)
    wrap_method(Scheduler, "update_from_output", _learn_acceptance)


def _limit_drafts(original: Function) -> Function:
    """Symptom: a request that asked for fewer drafts, or for none, or whose prompt of
    embeddings allows none, has as many verified as all others.

    Reason: V2's speculator drafts one number for a batch, and the scheduler plans so
    many for each request. Remove when a request can have a number of its own.
    """
    from vllm_budgetdraft.vllm_integration.sampling import most_drafts

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self.vllm_config):
            config = self.vllm_config.speculative_config
            for request in self.running:
                limit = getattr(request, ATTRIBUTE, None)
                if limit is None:
                    limit = most_drafts(request, config.settings)
                    setattr(request, ATTRIBUTE, limit)
                if len(request.spec_token_ids) > limit:
                    request.spec_token_ids = request.spec_token_ids[:limit]
        return original(self, *args, **kwargs)

    return schedule


def _choose_lengths(original: Function) -> Function:
    """Symptom: with ``adaptive_draft_length``, V2 verifies ever the same number.

    Reason: the scheduler says how many drafts each step has, before the speculator
    runs, from a table by batch size. Ours is one that learns. Remove when a speculator
    can say it.
    """

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = self.vllm_config
        if not (_is_ours(config) and config.use_v2_model_runner):
            return
        settings = config.speculative_config.settings
        if settings.adaptive_draft_length:
            from vllm_budgetdraft.vllm_integration.v2.adaptive_schedule import (
                AdaptiveSchedule,
            )

            self.dynamic_sd_lookup = AdaptiveSchedule(self, settings)

    return initialise


def _learn_acceptance(original: Function) -> Function:
    """The other half of ``_choose_lengths``: what became of the drafts."""

    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any
    ) -> Any:
        schedule = self.dynamic_sd_lookup
        taken = getattr(model_runner_output, statistics.ATTRIBUTE, None) or {}
        if hasattr(schedule, "use_costs") and STEP_COSTS in taken:
            schedule.use_costs(taken[STEP_COSTS])
        if hasattr(schedule, "record") and model_runner_output.sampled_token_ids:
            rows = zip(
                model_runner_output.req_ids,
                model_runner_output.sampled_token_ids,
                strict=True,
            )
            schedule.record(
                scheduler_output.scheduled_spec_decode_tokens,
                {request_id: len(tokens) for request_id, tokens in rows},
            )
        return original(self, scheduler_output, model_runner_output)

    return update_from_output
