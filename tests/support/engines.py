"""vLLM engines for tests, each in a process of its own."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parents[2] / "models"
TARGET = str(MODELS / "books-9m")
DRAFTER = str(MODELS / "books-9m-drafter")

#: In float32 an argmax does not depend on how many tokens vLLM verifies at once.
ENGINE_ARGS = {
    "model": TARGET,
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 8,
}


@dataclass(frozen=True)
class Job:
    """Prompts sent at once, with sampling parameters each (or the same for all)."""

    prompts: list[list[int]]
    sampling: list[dict[str, Any]] | dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Of one job: tokens and text by prompt, and what was drafted and accepted."""

    token_ids: list[list[int]]
    texts: list[str]
    num_draft_tokens: int
    num_accepted_tokens: int


def run_jobs(engine_args: dict[str, Any], jobs: dict[str, Job]) -> dict[str, Answer]:
    """Runs the jobs one after the other on one new engine."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_run, (ENGINE_ARGS | engine_args, jobs))


def _run(engine_args: dict[str, Any], jobs: dict[str, Job]) -> dict[str, Answer]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(**engine_args, disable_log_stats=False)
    return {name: _answer(llm, job) for name, job in jobs.items()}


def _answer(llm: Any, job: Job) -> Answer:
    from vllm import SamplingParams

    before = _counters(llm)
    settings = job.sampling
    if isinstance(settings, dict):
        settings = [settings] * len(job.prompts)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job.prompts],
        [SamplingParams(**{"temperature": 0.0, **each}) for each in settings],
        use_tqdm=False,
    )
    after = _counters(llm)
    return Answer(
        token_ids=[list(output.outputs[0].token_ids) for output in outputs],
        texts=[output.outputs[0].text for output in outputs],
        num_draft_tokens=after[0] - before[0],
        num_accepted_tokens=after[1] - before[1],
    )


def _counters(llm: Any) -> tuple[int, int]:
    found = {metric.name: metric for metric in llm.get_metrics()}
    names = ("num_draft_tokens", "num_accepted_tokens")
    counters = [found.get(f"vllm:spec_decode_{name}") for name in names]
    drafted, accepted = (counter.value if counter else 0 for counter in counters)
    return drafted, accepted


def book_tokens(num_tokens: int, start: int = 0) -> list[int]:
    """Tokens of a real book that neither model was trained on."""
    from transformers import AutoTokenizer

    import vllm_budgetdraft.demo.comparison as comparison

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    text = comparison.EXCERPT.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens[start : start + num_tokens]


def wait_until(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.5)
    return False
