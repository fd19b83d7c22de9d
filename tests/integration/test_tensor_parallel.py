"""Two ranks: each drafts for itself, and they must agree."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import models

pytestmark = pytest.mark.vllm

#: A target that two ranks can share; models/books-9m has five heads.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
NUM_DRAFTS = 4


def last_drafts(worker: Any) -> list[tuple[int, int, list[int]]]:
    """Slot, context length and drafts of each request that a rank holds."""
    held = worker.model_runner.drafter._drafter._slots._held
    return [(h.slot, h.num_tokens, h.drafts) for _, h in sorted(held.items())]


def generate(folder: str) -> tuple[list[list[list[int]]], list[Any]]:
    """Tokens without drafts and with them, and what each rank drafted last."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the ranks
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_model_len=512,
        max_num_seqs=3,
        speculative_config={
            "method": "budgetdraft",
            "model": folder,
            "num_speculative_tokens": NUM_DRAFTS,
            "kv_budget": 64,
        },
    )
    prompts = [models.random_tokens(n, seed=n).tolist() for n in (5, 40, 150, 300)]
    sampling = {
        "temperature": 0.0,
        "max_tokens": 40,
        "ignore_eos": True,
        "detokenize": False,
    }
    tokens = []
    for asked in ({"num_speculative_tokens": 0}, None):
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(**sampling, extra_args=asked),
            use_tqdm=False,
        )
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    drafted = llm.collective_rpc(last_drafts)
    llm.llm_engine.engine_core.shutdown()  # else its processes stay
    return tokens, drafted


def test_both_ranks_draft_the_same_and_the_output_is_that_without_drafts(
    tmp_path: Path,
) -> None:
    folder = str(models.write_model(tmp_path, models.llama(**SIZES)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as processes:
        (plain, drafted), ranks = processes.submit(generate, folder).result()
    assert drafted == plain
    assert len(ranks) == 2
    assert ranks[0] == ranks[1]
    assert any(len(drafts) == NUM_DRAFTS for *_, drafts in ranks[0])
