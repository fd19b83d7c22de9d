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


def ended(worker: Any) -> list[tuple[int, bool, int, list[int]]]:
    """What a rank's proposer knows of the requests that were in its last step."""
    held = worker.model_runner.drafter._slots._held
    return [
        (h.slot, h.is_read, h.num_tokens, h.drafts) for _, h in sorted(held.items())
    ]


def _generate(folder: str, speculative_config: dict[str, Any] | None) -> Any:
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
        speculative_config=speculative_config,
    )
    prompts = [models.random_tokens(n, seed=n).tolist() for n in (5, 40, 150, 300)]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(
            temperature=0.0, max_tokens=60, ignore_eos=True, detokenize=False
        ),
        use_tqdm=False,
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    if speculative_config is None:
        return tokens, None
    return tokens, llm.collective_rpc(ended)


def generate(*args: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as processes:
        return processes.submit(_generate, *args).result()


def test_both_ranks_draft_the_same_and_the_output_is_plain_vllms(
    tmp_path: Path,
) -> None:
    folder = str(models.write_model(tmp_path, models.llama(**SIZES)))
    settings = {
        "method": "budgetdraft",
        "model": folder,
        "num_speculative_tokens": 4,
        "kv_budget": 64,
    }
    plain, _ = generate(folder, None)
    drafted, (first, second) = generate(folder, settings)
    assert drafted == plain
    assert first == second
    assert any(len(drafts) == 4 for *_, drafts in first)
