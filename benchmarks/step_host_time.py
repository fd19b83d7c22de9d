r"""What a step costs the host beside drafting, with an engine that is none.

    python -m benchmarks.step_host_time --drafter models/books-9m-drafter \
        --draft-lengths benchmarks/results/draft-length*.json \
        --output benchmarks/results/step-host-time.json

The adapters of both model runners are the real ones; their requests, tensors and steps
are those that vLLM hands over, sampled at a temperature and with a top-k. All prompts
are read. Where the drafter would draft, fixed tokens come back, as those of a replayed
graph do: what is left is the host's. In V1 that includes the choice of a draft length;
"none" are steps for which it chooses no drafts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_budgetdraft import provenance
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.proposer import adaptive_length
from vllm_budgetdraft.proposer.building import build_proposer
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.picking import Drafts
from vllm_budgetdraft.proposer.step_costs import StepCosts
from vllm_budgetdraft.vllm_integration.v1 import proposer as runner_v1
from vllm_budgetdraft.vllm_integration.v2 import own_cache_speculator as runner_v2

PROMPT_TOKENS, MAX_MODEL_LEN, KV_BUDGET, WARM_UP = 100, 2048, 64, 20
#: What is drafted, and what the target writes.
DRAFT = 1
#: A small one: what a GPU does with distributions is not the host's.
VOCAB_SIZE = 8
#: What a step is said to take besides drafts, and a draft for which it drafts none.
STEP_SECONDS, NEVER_WORTH_IT = 1e3, 1e6
#: Of the drafts, how many the target accepts in every step.
ACCEPTED = 2
SAMPLING = SamplingParams(temperature=1.0, top_k=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--draft-lengths",
        type=Path,
        nargs="*",
        default=[],
        help="results of benchmarks.draft_length, of whose adaptive lengths the worst "
        "speed over plain vLLM is noted beside",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors are small
    document: dict[str, Any] = {}
    runners = {
        "v1": RunnerV1,
        "v1_none": partial(RunnerV1, draft_seconds=NEVER_WORTH_IT),
        "v2": RunnerV2,
    }
    for name, runner in runners.items():
        for batch_size in args.batch_sizes:
            step = runner(args.drafter, batch_size, args.num_speculative_tokens).step
            with mock.patch.object(adaptive_length, "EXPLORATION", 0.0):
                times = timed(step, args.steps)
            document[f"{name}_batch_{batch_size}_ms"] = statistics.median(times)
            document[f"{name}_batch_{batch_size}_all_ms"] = times
    adaptive = [
        row["ratio_to_plain"]
        for file in args.draft_lengths
        for row in json.loads(file.read_text(encoding="utf-8"))["results"]
        if row["method"].startswith("adaptive")
    ]
    if adaptive:
        document["worst_adaptive_over_plain"] = min(adaptive)
    files = {"output": None, "draft_lengths": [x.name for x in args.draft_lengths]}
    document["provenance"] = provenance.collect(vars(args) | files)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    for name, value in document.items():
        if not isinstance(value, list | dict):
            print(f"{name}: {value:.3f}")


def timed(step: Callable[[], float], count: int) -> list[float]:
    """Milliseconds that each of so many steps says, after some to warm up."""
    return [step() * 1000 for _ in range(WARM_UP + count)][WARM_UP:]


class RunnerV1:
    """What model runner V1 knows of a batch."""

    def __init__(
        self,
        drafter: str,
        batch_size: int,
        num_drafts: int,
        draft_seconds: float = 0.0,
    ) -> None:
        self._core, config = build(drafter, batch_size, num_drafts)
        self._num_drafts = num_drafts
        self._are_drafted = 0 if draft_seconds else num_drafts
        drafting = {1: {1: draft_seconds}, num_drafts: {1: draft_seconds}}
        costs = StepCosts({1: STEP_SECONDS}, drafting, num_drafts)
        with mock.patch.object(runner_v1, "load_core", lambda *_, **__: self._core):
            self._proposer = runner_v1.BudgetDraftProposer(config)
            self._proposer.load_model(None)
        with mock.patch.object(runner_v1, "time_steps", lambda *_: costs):
            self._proposer.time_steps(None)
        self._names = [f"request {i}" for i in range(batch_size)]
        self._runner = SimpleNamespace(
            requests={
                name: SimpleNamespace(
                    sampling_params=SAMPLING,
                    prompt_embeds=None,
                    num_prompt_tokens=PROMPT_TOKENS,
                )
                for name in self._names
            },
            input_batch=SimpleNamespace(
                req_ids=self._names,
                block_table=SimpleNamespace(block_tables=[]),
                num_computed_tokens_cpu=np.zeros(batch_size, dtype=np.int32),
            ),
        )
        self._start()

    def _start(self) -> None:
        shape = (len(self._names), MAX_MODEL_LEN)
        self._tokens = np.full(shape, DRAFT, dtype=np.int32)
        self._lengths = np.full(len(self._names), PROMPT_TOKENS, dtype=np.int64)

    def step(self) -> float:
        """Seconds that it took, statistics included."""
        if self._lengths[0] + self._num_drafts + 1 >= MAX_MODEL_LEN:
            self._start()
        self._lengths += ACCEPTED + 1
        sampled = [[DRAFT] * (ACCEPTED + 1) for _ in self._names]
        verified = {name: [DRAFT] * self._are_drafted for name in self._names}
        start = time.perf_counter()
        self._proposer.bind(self._runner, verified)
        drafts = self._proposer.propose(sampled, self._lengths, self._tokens)
        self._proposer.take_statistics()
        seconds = time.perf_counter() - start
        assert {len(each) for each in drafts} == {self._are_drafted}, drafts
        return seconds


class RunnerV2:
    """What model runner V2 knows of a batch."""

    def __init__(self, drafter: str, batch_size: int, num_drafts: int) -> None:
        self._core, config = build(drafter, batch_size, num_drafts)
        self._num_drafts = num_drafts
        self._batch_size = batch_size
        lengths = torch.full((batch_size,), PROMPT_TOKENS, dtype=torch.int32)
        tokens = torch.zeros((batch_size, MAX_MODEL_LEN), dtype=torch.int32)
        self._states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=tokens),
            total_len=SimpleNamespace(gpu=lengths),
            req_id_to_index={f"request {i}": i for i in range(batch_size)},
            index_to_req_id={i: f"request {i}" for i in range(batch_size)},
        )
        self._speculator = runner_v2.OwnCacheSpeculator(
            config, self._core.device, self._states
        )
        with mock.patch.object(runner_v2, "load_core", lambda *_, **__: self._core):
            self._speculator.load_model(None)
        self._last = torch.zeros((batch_size, 1), dtype=torch.int64)
        self._temperature = torch.ones(batch_size)
        for name in self._states.req_id_to_index:
            request = SimpleNamespace(
                sampling_params=SAMPLING,
                prefill_token_ids=[0] * PROMPT_TOKENS,
                num_computed_tokens=0,
                prompt_embeds=None,
            )
            self._speculator.add_request(name, request)

    def step(self) -> float:
        """Seconds that it took, statistics included."""
        size, lengths = self._batch_size, self._states.total_len.gpu
        if int(lengths[0]) + self._num_drafts + 1 >= MAX_MODEL_LEN:
            lengths.fill_(PROMPT_TOKENS)
        lengths += ACCEPTED + 1
        counts = np.full(size, self._num_drafts, dtype=np.int32)
        batch = mock.NonCallableMock(spec=InputBatch)
        batch.num_reqs = size
        batch.idx_mapping = torch.arange(size)
        batch.idx_mapping_np = np.arange(size)
        batch.num_scheduled_tokens = counts + PROMPT_TOKENS
        batch.num_draft_tokens_per_req = counts
        batch.num_computed_prefill_tokens_np = np.full(size, PROMPT_TOKENS)
        start = time.perf_counter()
        drafts = self._speculator.propose(
            batch, *[None] * 6, self._last, None, self._temperature, None
        )
        self._speculator.take_statistics()
        seconds = time.perf_counter() - start
        assert drafts.shape == (size, self._num_drafts)
        return seconds


def build(drafter: str, batch_size: int, num_drafts: int) -> tuple[DraftProposer, Any]:
    """A core that drafts nothing, and what of vLLM's configuration adapters read."""
    core = build_proposer(
        BudgetDraftConfig(
            model=drafter, num_speculative_tokens=num_drafts, kv_budget=KV_BUDGET
        ),
        num_slots=batch_size,
        max_model_len=MAX_MODEL_LEN,
        dtype=torch.float32,
        device="cpu",
    )
    drafts = Drafts(
        torch.full((batch_size, num_drafts), DRAFT),
        torch.ones((batch_size, num_drafts)),
        torch.full((batch_size, num_drafts, VOCAB_SIZE), 1 / VOCAB_SIZE),
    )
    core.drawn_logits = DrawnLogits(
        batch_size, num_drafts, VOCAB_SIZE, torch.float32, core.device
    )
    core.draft = lambda *_, **__: drafts  # type: ignore[method-assign]
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(settings=core.config),
        scheduler_config=SimpleNamespace(max_num_seqs=batch_size),
        model_config=SimpleNamespace(
            max_model_len=MAX_MODEL_LEN,
            dtype=torch.float32,
            seed=0,
            get_vocab_size=lambda: VOCAB_SIZE,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    return core, config


if __name__ == "__main__":
    main()
