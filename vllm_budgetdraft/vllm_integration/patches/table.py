"""Every function of vLLM that is wrapped: where, why, and until when."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vllm_budgetdraft.vllm_integration.compatibility import (
    OLDEST_WITH_RUNNER_V2,
    is_at_least,
)
from vllm_budgetdraft.vllm_integration.patches import (
    engine_core,
    every_process,
    front_end,
    worker,
)
from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method

#: When a patch is applied: "plugin", when vLLM loads plugins, in every process;
#: "config", when our config is first imported, in every process of an engine of ours;
#: "worker", when what drafts is built.
Moment = Literal["plugin", "config", "worker"]


@dataclass(frozen=True)
class Patch:
    """One function of vLLM's, and what it is wrapped for.

    Attributes:
        target: its module and its name there, with a colon between.
        moment: when it is wrapped.
        process: where that matters.
        make: the wrapper, of the original.
        symptom: what users see without it.
        reason: why vLLM is so.
        remove: when it can go.
        oldest: the oldest vLLM that it is for; None for any, also for one that is not
            supported, for the plugin to say so.
    """

    target: str
    moment: Moment
    process: str
    make: Callable[[Function], Function]
    symptom: str
    reason: str
    remove: str
    oldest: tuple[int, int] | None = None

    def apply(self) -> None:
        module, name = self.target.split(":")
        owner = importlib.import_module(module)
        *classes, function = name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        wrap_method(owner, function, self.make)


PATCHES = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        "plugin",
        "front end",
        every_process.make_our_config,
        symptom='vLLM refuses `"method": "budgetdraft"`.',
        reason=(
            "Its methods are a closed list, and its config forbids unknown keys. Ours "
            'becomes "custom_class", the method for proposers from outside.'
        ),
        remove="a plugin can register a speculative method",
    ),
    Patch(
        "vllm.config:VllmConfig._get_v2_model_runner_unsupported_features",
        "plugin",
        "all",
        every_process.support_runner_v2,
        symptom="vLLM chooses model runner V1, which is deprecated.",
        reason='Its list of what V2 cannot do has "custom_class", by that name.',
        remove="a plugin can register a speculator",
        oldest=OLDEST_WITH_RUNNER_V2,
    ),
    Patch(
        "vllm.v1.worker.gpu.spec_decode:init_speculator",
        "plugin",
        "worker",
        every_process.make_our_speculator,
        symptom='Model runner V2 ends with "custom_class is not supported yet".',
        reason="Its speculators are a closed list.",
        remove="a plugin can register a speculator",
        oldest=OLDEST_WITH_RUNNER_V2,
    ),
    Patch(
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        "config",
        "front end",
        front_end.check_request,
        symptom=(
            "`min_p` and `logit_bias` are refused; a wrong `kv_budget` in `extra_args` "
            "is not, and is found in the worker, where no error can reach the client."
        ),
        reason=(
            "vLLM verifies without `min_p` and `logit_bias` under every method, and "
            "hands `extra_args` on unread."
        ),
        remove="vLLM verifies with both, and lets a plugin check requests",
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "config",
        "front end",
        front_end.show_statistics,
        symptom="`/metrics` says nothing of drafting but vLLM's own counts.",
        reason=(
            "Its loggers are of a closed list, or of an entry point that switches "
            "statistics on for every engine where this package is installed."
        ),
        remove="a logger can be added for one engine",
    ),
    *(
        Patch(
            target,
            "config",
            "front end",
            front_end.refuse_deep_sleep,
            symptom="After sleep level 2, the drafter's weights are garbage.",
            reason="vLLM discards all weights, and reloads the target's alone.",
            remove="vLLM has proposers reload their weights on waking",
        )
        for target in (
            "vllm.v1.engine.llm_engine:LLMEngine.sleep",
            "vllm.v1.engine.async_llm:AsyncLLM.sleep",
        )
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.__init__",
        "config",
        "engine core",
        engine_core.make_our_scheduler,
        symptom="Everything that is listed under `DraftScheduler` below.",
        reason=(
            "`scheduler_cls` has room for one class, which is the user's, and vLLM "
            "warns of whatever is there."
        ),
        remove="no method of `DraftScheduler` is left",
    ),
    Patch(
        "vllm.v1.worker.gpu_worker:Worker.load_model",
        "worker",
        "worker",
        worker.make_our_worker,
        symptom=(
            "Everything that is listed under `DraftWorker`, `DraftingRunner`, "
            "`DraftingSampler` and `DraftVerifier` below."
        ),
        reason="A worker makes its runner, a runner its samplers; neither can be told.",
        remove="no method of these classes is left",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:build_logitsprocs",
        "worker",
        "worker, V1",
        worker.build_every_processor,
        symptom="`min_p` and `logit_bias` are without effect.",
        reason="vLLM builds no processor for them under speculation.",
        remove="it builds them",
    ),
    Patch(
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        "worker",
        "worker, V1, CPU",
        worker.expand_every_type,
        symptom=(
            "At temperatures above 0, output has another distribution under any "
            "speculation (vLLM issue 55005)."
        ),
        reason=(
            "Temperatures, `top_p` and `top_k` of each draft are written to a copy "
            "that is thrown away."
        ),
        remove="that issue is fixed",
    ),
    Patch(
        "vllm.v1.sample.rejection_sampler:rejection_sample",
        "worker",
        "worker, V1",
        worker.verify_seeded_and_padded,
        symptom=(
            "A request's seed does not give the output that it gives without "
            "speculation, but one that changes with the batch. On a CPU, the first "
            "token after a prompt of one token has another distribution if others are "
            "decoding."
        ),
        reason=(
            "Rejection sampling takes a request's noise for other purposes, and more "
            "of it the more is drafted. The scheduler pads such a prompt with drafts "
            "of -1, which GPUs reject, and for which the CPU kernels look beside the "
            "row."
        ),
        remove=(
            "vLLM's noise is a function of seed and position, and the CPU kernels "
            "reject such drafts"
        ),
    ),
)


def apply(moment: Moment) -> None:
    """Wraps what is to be wrapped then, and was not yet.

    Raises:
        ImportError, AttributeError: this vLLM does not have it.
    """
    import vllm

    for patch in due(moment, vllm.__version__):
        patch.apply()


def due(moment: Moment, version: str) -> list[Patch]:
    """The patches of a moment that a vLLM of this version needs."""
    return [
        patch
        for patch in PATCHES
        if patch.moment == moment
        and (patch.oldest is None or is_at_least(version, patch.oldest))
    ]
