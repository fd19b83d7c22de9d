"""What vLLM does without what we change: each patch is there for a reason.

A test here takes vLLM's own function, or its own method, shows the symptom, and then
that it is gone.
"""

import asyncio
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.engines import ENGINE_ARGS
from tests.support.patches import make_engine_args, make_patched_config, theirs
from tests.support.processes import nothing
from vllm_budgetdraft import vllm_integration
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.vllm_integration.compatibility import supports_runner_v2
from vllm_budgetdraft.vllm_integration.patches.table import PATCHES, due

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def config() -> Any:
    return make_patched_config()


def test_vllm_refuses_the_method(config, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    name = "create_speculative_config"
    monkeypatch.setattr(EngineArgs, name, theirs(f"EngineArgs.{name}"))
    with pytest.raises(ValueError, match="budgetdraft"):
        make_engine_args().create_engine_config()


def test_vllm_chooses_v1_and_v2_has_no_place_for_ours(config):
    import vllm
    from vllm.config import VllmConfig

    if not supports_runner_v2(vllm.__version__):
        pytest.skip("of a vLLM whose model runner V2 takes no drafter of ours")
    name = "_get_v2_model_runner_unsupported_features"
    method = "speculative method 'custom_class'"
    assert method in theirs(f"VllmConfig.{name}")(config)
    assert method not in getattr(VllmConfig, name)(config)
    with pytest.raises(NotImplementedError, match="custom_class"):
        theirs("init_speculator")(config, torch.device("cpu"), None)


def test_vllm_refuses_what_works_and_takes_what_cannot(config):
    from vllm import SamplingParams, exceptions

    validate = theirs("SamplingParams._validate_spec_decode")
    speculative = config.speculative_config
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={1: 2.0})):
        with pytest.raises(exceptions.VLLMValidationError, match="min_p"):
            validate(params, speculative)
        params._validate_spec_decode(speculative)
    wrong = SamplingParams(extra_args={"kv_budget": -1})
    validate(wrong, speculative)
    with pytest.raises(ValueError, match="kv_budget"):
        wrong._validate_spec_decode(speculative)


def test_vllm_logs_nothing_of_ours(config):
    from vllm.v1.metrics.loggers import StatLoggerManager

    def loggers(initialise: Any) -> list[str]:
        manager = object.__new__(StatLoggerManager)
        initialise(
            manager, config, custom_stat_loggers=None, enable_default_loggers=False
        )
        return [type(each).__name__ for each in manager.stat_loggers]

    ours = "BudgetDraftStatLogger"
    assert ours not in loggers(theirs("StatLoggerManager.__init__"))
    assert ours in loggers(StatLoggerManager.__init__)


@pytest.mark.parametrize("name", ["LLMEngine", "AsyncLLM"])
def test_vllm_discards_weights_that_it_would_not_reload(name, config):
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    asked: list[int] = []

    def note(level: int, *_: Any) -> None:
        asked.append(level)
        raise StopError

    engine = SimpleNamespace(
        vllm_config=config,
        engine_core=SimpleNamespace(sleep=note, sleep_async=note),
        renderer=SimpleNamespace(clear_mm_cache=nothing, clear_mm_cache_async=soon),
        reset_mm_cache=soon,
    )

    def sleep(function: Any, level: int) -> None:
        with pytest.raises(StopError):
            if inspect.isawaitable(slept := function(engine, level)):
                asyncio.run(slept)

    patched = {"LLMEngine": LLMEngine, "AsyncLLM": AsyncLLM}[name].sleep
    sleep(theirs(f"{name}.sleep"), 2)
    assert asked == [2]
    with pytest.raises(UnsupportedVllmError, match="use level 1"):
        patched(engine, 2)
    sleep(patched, 1)
    assert asked == [2, 1]


class StopError(Exception):
    """Instead of what would take long."""


async def soon(*_: Any) -> None:
    """Nothing."""


def test_vllm_builds_no_processor_for_min_p_and_logit_bias(config):
    from vllm.v1.worker import gpu_model_runner

    def names(build: Any) -> set[str]:
        built = build(config, torch.device("cpu"), False, False)
        return {type(each).__name__ for each in built.all}

    ours = {"MinPLogitsProcessor", "LogitBiasLogitsProcessor"}
    assert not ours & names(theirs("build_logitsprocs"))
    assert ours <= names(gpu_model_runner.build_logitsprocs)


def test_a_vllm_of_any_version_knows_the_method_and_says_that_it_is_not_supported():
    for version in ("0.24.0", "0.99.0", "dev"):
        targets = {patch.target for patch in due("plugin", version)}
        assert "vllm.engine.arg_utils:EngineArgs.create_speculative_config" in targets
    assert len(due("plugin", "0.27.0")) == 1  # its V2 takes no speculator
    assert len(due("plugin", "0.33.0")) == 3


def test_engines_of_others_are_left_alone(config):
    """In a process that has ours, too."""
    from vllm import SamplingParams, exceptions
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu_worker import Worker

    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    others = EngineArgs(**ENGINE_ARGS, speculative_config=ngram).create_engine_config()
    assert type(make_scheduler(others)) is Scheduler
    with pytest.raises(exceptions.VLLMValidationError, match="min_p"):
        SamplingParams(min_p=0.1)._validate_spec_decode(others.speculative_config)
    processors = gpu_model_runner.build_logitsprocs(
        others, torch.device("cpu"), False, False
    )
    assert len([*processors.all]) == 1
    asked: list[int] = []
    LLMEngine.sleep(
        SimpleNamespace(
            vllm_config=others,
            engine_core=SimpleNamespace(sleep=lambda level, *_: asked.append(level)),
            renderer=SimpleNamespace(clear_mm_cache=nothing),
            logger_manager=None,
            reset_mm_cache=nothing,
        ),
        2,
    )
    assert asked == [2]
    worker = object.__new__(Worker)
    worker.vllm_config = others

    def stop(*_: Any, **__: Any) -> None:
        raise StopError

    worker._maybe_get_memory_pool_context = stop
    with pytest.raises(StopError):
        worker.load_model()
    assert type(worker) is Worker


# The scheduler.


def make_scheduler(config: Any, initialise: Any = None) -> Any:
    """vLLM's scheduler over a cache of 64 blocks, made by ``initialise``."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.structured_output import StructuredOutputManager

    config.cache_config.num_gpu_blocks = 64
    block_size = config.cache_config.block_size
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=16, dtype=torch.float32
    )
    scheduler = object.__new__(Scheduler)
    (initialise or Scheduler.__init__)(
        scheduler,
        config,
        KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(config),
        block_size,
        log_stats=True,
    )
    return scheduler


def add(scheduler: Any, name: str, **sampling: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=20, **sampling)
    request = Request(name, list(range(1, 9)), params, None, cache_salt="salt")
    scheduler.add_request(request)
    return request


def test_vllm_makes_a_scheduler_that_knows_no_drafts(config):
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_budgetdraft.vllm_integration.scheduler import DraftScheduler

    assert type(make_scheduler(config, theirs("Scheduler.__init__"))) is Scheduler
    assert isinstance(make_scheduler(config), DraftScheduler)


def scheduled_drafts(scheduler: Any) -> int:
    """Of a request that wants one, where four were drafted."""
    extra = {"num_speculative_tokens": 1}
    request = add(scheduler, "a", extra_args=extra)
    scheduler.schedule()
    request.num_computed_tokens = request.num_tokens
    request.append_output_token_ids([5])
    request.spec_token_ids = [1, 2, 3, 4]
    output = scheduler.schedule()
    return len(output.scheduled_spec_decode_tokens["a"])


def test_without_schedule_a_request_has_more_verified_than_it_asked_for(
    config, monkeypatch
):
    from vllm_budgetdraft.vllm_integration.scheduler import DraftScheduler

    assert scheduled_drafts(make_scheduler(config)) == 1
    monkeypatch.delattr(DraftScheduler, "schedule")
    assert scheduled_drafts(make_scheduler(config)) == 4


def test_without_schedule_nobody_tells_workers_of_salts_and_resets(config, monkeypatch):
    from vllm_budgetdraft.vllm_integration.remembering import ATTRIBUTE, Told
    from vllm_budgetdraft.vllm_integration.scheduler import DraftScheduler

    def told() -> Any:
        scheduler = make_scheduler(config)
        scheduler.reset_prefix_cache()
        add(scheduler, "a")
        (new,) = scheduler.schedule().scheduled_new_reqs
        return getattr(new, ATTRIBUTE, None)

    assert told() == Told("salt", 1, 0)
    with monkeypatch.context() as without:
        without.delattr(DraftScheduler, "reset_prefix_cache")
        assert told() == Told("salt", 0, 0)
    monkeypatch.delattr(DraftScheduler, "schedule")
    assert told() is None


def test_without_make_stats_the_front_end_is_told_nothing(config, monkeypatch):
    from vllm_budgetdraft.vllm_integration.metrics.statistics import KEY
    from vllm_budgetdraft.vllm_integration.scheduler import DraftScheduler

    def told() -> Any:
        return (make_scheduler(config).make_stats().kv_connector_stats or {}).get(KEY)

    assert told() is not None
    monkeypatch.delattr(DraftScheduler, "make_stats")
    assert told() is None


# The worker.


def test_vllm_makes_a_worker_that_sends_nothing(config):
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_budgetdraft.vllm_integration.v1.runner import DraftingRunner
    from vllm_budgetdraft.vllm_integration.worker import DraftWorker

    class Runner(GPUModelRunner):
        def __init__(self) -> None: ...

    worker = object.__new__(Worker)
    worker.vllm_config, worker.model_runner = config, Runner()

    def stop(*_: Any, **__: Any) -> None:
        raise StopError

    worker._maybe_get_memory_pool_context = stop
    with pytest.raises(StopError):
        theirs("Worker.load_model")(worker)
    assert type(worker) is Worker
    with pytest.raises(StopError):
        worker.load_model()
    assert isinstance(worker, DraftWorker)
    assert isinstance(worker.model_runner, DraftingRunner)


#: Of each method that is overridden, the test that holds its symptom gone. Tests here
#: and in test_samplers show it without the method, too; others need an engine.
HELD = {
    "scheduler.DraftScheduler": {
        "schedule": "test_without_schedule_nobody_tells_workers_of_salts_and_resets",
        "reset_prefix_cache": (
            "test_without_schedule_nobody_tells_workers_of_salts_and_resets"
        ),
        "update_from_output": "test_adaptive_default.test_output_is_plain_vllms_and",
        "make_stats": "test_without_make_stats_the_front_end_is_told_nothing",
    },
    "worker.DraftWorker": {
        "compile_or_warm_up_model": (
            "test_adaptive_default.test_output_is_plain_vllms_and"
        ),
        "sample_tokens": "test_server.test_metrics_are_vllms_and_ours",
        "execute_model": "test_server.test_pages_are_in_use_while_a_request_is_there",
    },
    "v1.runner.DraftingRunner": {
        "load_model": "test_sampling_fields.test_every_kind_is_answered",
        "propose_draft_token_ids": "test_sampling.test_drawn_drafts_are_accepted",
        "_setup_eagle3_aux_hidden_state_outputs": "test_eagle3.test_drafts_are_those",
        "_sample": "test_sampling.test_a_batch_of_many_kinds",
        "_calc_spec_decode_metadata": "test_sampling.test_a_batch_of_many_kinds",
        "_input_fits_in_drafter": "test_greedy_equivalence.test_long_prompts_keep",
        "profile_run": "test_device_path_v1.test_an_engine_goes_where_gpus_go",
        "_dummy_sampler_run": "test_device_path_v1.test_an_engine_goes_where_gpus_go",
    },
    "v1.samplers.DraftingSampler": {
        "forward": "test_samplers.test_of_a_batch_each_has_the_logprobs",
        "apply_logits_processors": "test_sampling_fields.test_every_kind_is_answered",
    },
    "v1.samplers.DraftVerifier": {
        "forward": "test_samplers.test_named_logprobs_of_every_token",
        "apply_logits_processors": "test_samplers.test_verification_heeds_min_p",
    },
    "v2.runner.DraftingRunner": {
        "load_model": "test_eagle3.test_model_runner_v2_drafts_the_same",
        "add_requests": "test_runner_v2.test_random_lives",
        "prepare_attn": "test_flexdraft_runners.test_both_runners_draft_the_same",
        "take_draft_token_ids": (
            "test_flexdraft_runners.test_both_runners_verify_what_the_drafter_is"
        ),
    },
    "v2.samplers.DraftingSampler": {
        "add_request": "test_sampling_fields.test_so_is_every_greedy_kind_in_runner_v2",
    },
    "v2.samplers.DraftVerifier": {
        "__call__": "test_sampling_fields.test_so_is_every_greedy_kind_in_runner_v2",
    },
}


def test_every_method_that_is_overridden_is_held_by_a_test():
    for name, tests in HELD.items():
        module, _, subclass = name.rpartition(".")
        found = importlib.import_module(f"{vllm_integration.__name__}.{module}")
        overridden = {
            name
            for name, method in vars(getattr(found, subclass)).items()
            if getattr(method, "__override__", False)
        }
        assert overridden == set(tests), name
    for test in {test for tests in HELD.values() for test in tests.values()}:
        file, _, name = test.rpartition(".")
        path = Path(__file__).with_stem(file) if file else Path(__file__)
        assert f"\ndef {name}" in path.read_text(), test


def test_each_wrapper_has_a_test_without_it():
    here = Path(__file__)
    text = here.read_text() + here.with_stem("test_samplers").read_text()
    for patch in PATCHES:
        name = patch.target.rpartition(".")[2].rpartition(":")[2]
        assert re.search(rf'theirs\([^)]*{name}|"{name}"', text), patch.target
