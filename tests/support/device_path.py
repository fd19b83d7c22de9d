"""What an engine does on a GPU alone, on a CPU, in both model runners.

Graphs, events, pinned copies, the kernels and what they are compiled for: see
``tests.support.fake_gpu``. Every argument of every kernel is checked.
"""

from typing import Any

from tests.support import fake_gpu
from tests.support.engines import (
    DRAFTER,
    NATIVE_512,
    Request,
    SteppedEngine,
    engine_process,
)
from tests.support.scripts import check, counted_metrics, has_generated, of_book
from vllm_budgetdraft.proposer.draft_length import ladder

NUM_SLOTS, NUM_DRAFTS = 3, 2
COMMON: dict[str, Any] = {
    "max_model_len": 400,
    "max_num_seqs": NUM_SLOTS,
    # vLLM compiles nothing, and drafting captures nevertheless.
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "NONE"},
}
DRAFTING = {
    "method": "budgetdraft",
    "adaptive_draft_length": False,
    "model": DRAFTER,
    "num_speculative_tokens": NUM_DRAFTS,
    "attention_backend": "triton",
    "kv_budget": 64,
    "page_size": 8,
    "recent_window": 24,
}
#: Of each runner, settings by which tokens come without drafts, and are appended later:
#: V1 drafts nothing for three requests, V2 reads less of prompts than it is given.
RUNNERS = {
    "v1": (
        fake_gpu.prepare_v1,
        {
            "eviction_policy": "heavy_hitter",
            "num_speculative_tokens_per_batch_size": [[1, 2, NUM_DRAFTS], [3, 3, 0]],
        },
    ),
    "v2": (
        fake_gpu.prepare_v2,
        {
            "model": NATIVE_512,
            "position_mode": "cache_relative",
            "draft_prefill_chunk": 40,
            "draft_dtype": "bfloat16",
        },
    ),
}


def finish_start_up(engine: SteppedEngine) -> None:
    """What vLLM does on a GPU before it takes requests, and on a CPU leaves out."""
    import torch

    worker = engine._engine.model_executor.driver_worker.worker
    if hasattr(engine._runner, "speculator"):
        from vllm.v1.worker.gpu.warmup import warmup_kernels

        warmup_kernels(engine._runner, worker.execute_model, worker.sample_tokens)
    else:
        width = worker.model_config.get_hidden_size()
        engine._runner._dummy_sampler_run(torch.zeros(NUM_SLOTS, width))
    fake_gpu.finish_start_up()


def two_and_then_others(engine: SteppedEngine, requests: list[Request]) -> None:
    for i, request in enumerate(requests):
        course = engine.add(f"request {i}", request)
        if i == 1:
            engine.step_until(has_generated(course, 4))
    engine.finish()


def as_on_a_gpu(engine: SteppedEngine, greedy: list, drawn: list) -> None:
    finish_start_up(engine)
    core, appended = engine._drafter._core, []
    num_graphs = 3 * len(ladder(NUM_SLOTS))  # greedy, drawn, and of a top-k
    assert core.num_graphs == num_graphs, core.num_graphs
    append = core.append

    def noted(slots: Any, *args: Any, **kwargs: Any) -> None:
        appended.append(len(slots))
        append(slots, *args, **kwargs)

    core.append = noted
    known = set(fake_gpu.engine_launches.keys)
    for requests in (drawn, greedy):
        engine.courses.clear()
        two_and_then_others(engine, requests)
    compiled = fake_gpu.engine_launches.since(
        known, "budgetdraft_kernels", "rejection_sampler"
    )
    assert not compiled, f"compiled while requests waited: {compiled}"
    assert appended
    counted = counted_metrics()
    assert counted["draft_seconds_total"] > 0, counted  # by events
    assert counted["evicted_tokens_total"] > 0
    assert counted["draft_faults_total"] == 0


def goes_where_gpus_go(runner: str) -> None:
    """Fails at arguments that a kernel would misread, and at late compilation."""
    prepare, settings = RUNNERS[runner]
    speculation = {"speculative_config": DRAFTING | settings}
    # The second one outgrows its recent window.
    greedy = [of_book(30 + 60 * i, (16, 28, 8)[i], 300 * i) for i in range(3)]
    drawn = [of_book(20 + 70 * i, 9, 300 * i) for i in range(3)]
    for request in drawn:
        request.sampling["temperature"] = 1.0
    drawn[1].sampling["seed"] = 3
    drawn[2].sampling["top_k"] = 5
    with engine_process(COMMON | speculation, prepare) as engine:
        played = engine.play(as_on_a_gpu, greedy, drawn)
    plain = {"max_model_len": 400, "max_num_seqs": NUM_SLOTS}
    with engine_process(plain) as engine:
        check(played, engine)
