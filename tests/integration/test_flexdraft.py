"""In vLLM: the target drafts for itself, and its output stays what it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.distributions import (
    joint,
    next_logits,
    p_value,
    probabilities,
    sampling_engine,
    write_tokenizer,
)
from tests.support.engines import (
    FLEXDRAFT,
    TARGET,
    Job,
    book_tokens,
    nothing,
    run_jobs,
)
from tests.support.flex_twin import blind, random_drafter
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.flexdraft.checkpoint import (
    fingerprint,
    load_flexdraft,
    save_flexdraft,
)
from vllm_budgetdraft.flexdraft.decoding import FlexDecoder
from vllm_budgetdraft.flexdraft.pages import PageSelector

pytestmark = pytest.mark.vllm

NUM_DRAFTS = 5
#: vLLM's on a CPU, unless told otherwise.
BLOCK_SIZE = 32
MAX_MODEL_LEN = 2048


def draft(**settings: Any) -> dict[str, Any]:
    return {
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "model": FLEXDRAFT,
        "num_speculative_tokens": NUM_DRAFTS,
        "kv_budget": 256,
        "recent_window": 64,
        "local_tokens": 64,
        **settings,
    }


def engine_args(**settings: Any) -> dict[str, Any]:
    return {
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "speculative_config": draft(**settings),
    }


def reference_decoder(drafter: str, policy: str) -> FlexDecoder:
    """Of the embedded target, as ``engine_args`` has vLLM draft."""
    target = models.read_model(Path(TARGET))
    settings = EvictionSettings(eviction_policy=policy, local_tokens=64)
    return FlexDecoder(
        target,
        load_flexdraft(drafter, target, max_positions=MAX_MODEL_LEN),
        num_drafts=NUM_DRAFTS,
        selector=PageSelector(settings, BLOCK_SIZE),
        kv_budget=256,
        confidence_threshold=0.0,
    )


@pytest.mark.parametrize("policy", ["keep_all", "chunk_retrieval", "sink_window"])
def test_drafts_are_those_of_reference_decoding(policy):
    """Round by round, over a cache that is vLLM's and one that is not."""
    prompts = [book_tokens(n, start=n) for n in (100, 512, 700)]
    sampling = {"max_tokens": 60, "ignore_eos": True}
    jobs = {str(i): Job([prompt], sampling) for i, prompt in enumerate(prompts)}
    answers = run_jobs(engine_args(eviction_policy=policy, recent_window=512), jobs)
    decoder = reference_decoder(FLEXDRAFT, policy)
    for index, prompt in enumerate(prompts):
        answer = answers[str(index)]
        first, *others = answer.token_ids[0]
        (written,) = decoder.generate([[*prompt, first]], 59, mode="sequential")
        assert written == others
        rounds = len(decoder.accepted[0])
        assert answer.num_draft_tokens == rounds * NUM_DRAFTS
        assert 0 < answer.num_accepted_tokens <= sum(decoder.accepted[0])


@pytest.mark.parametrize("policy", ["keep_all", "chunk_retrieval"])
def test_parallel_drafts_are_those_of_reference_decoding(policy, tmp_path):
    blind_drafter = blind(tmp_path / "drafter")
    prompts = [book_tokens(n, start=n) for n in (100, 700)]
    sampling = {"max_tokens": 60, "ignore_eos": True}
    jobs = {str(i): Job([prompt], sampling) for i, prompt in enumerate(prompts)}
    settings = {"model": blind_drafter, "flex_decoding": "parallel"}
    arguments = engine_args(eviction_policy=policy, recent_window=512, **settings)
    answers = run_jobs(arguments, jobs)
    decoder = reference_decoder(blind_drafter, policy)
    for index, prompt in enumerate(prompts):
        answer = answers[str(index)]
        first, *others = answer.token_ids[0]
        rounds = {}
        for mode in ("sequential", "parallel"):
            (written,) = decoder.generate([[*prompt, first]], 59, mode=mode)
            assert written == others
            rounds[mode] = len(decoder.accepted[0])
        assert answer.num_draft_tokens == rounds["parallel"] * NUM_DRAFTS
        assert rounds["parallel"] != rounds["sequential"], "they say the same"
        assert 0 < answer.num_accepted_tokens <= sum(decoder.accepted[0])


def test_requests_that_are_preempted_go_on_as_they_would() -> None:
    """Their pages come back elsewhere; what was chosen of their prompts stays."""
    prompts = [book_tokens(500, start=100 * i) for i in range(8)]
    jobs = {"job": Job(prompts, {"max_tokens": 250, "ignore_eos": True})}
    scarce = {"num_gpu_blocks_override": 100, "enable_prefix_caching": False}
    plain = run_jobs({"max_model_len": MAX_MODEL_LEN}, jobs)["job"]
    drafted = run_jobs(engine_args() | scarce, jobs)["job"]
    assert drafted.token_ids == plain.token_ids
    assert drafted.num_accepted_tokens > 0


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_samples_have_the_targets_distribution(mode, tmp_path):
    samples_have_the_targets_distribution(mode, tmp_path, num_samples=10_000)


def samples_have_the_targets_distribution(
    mode: str,
    tmp_path: Path,
    num_samples: int,
    prepare: Callable[[], None] = nothing,
) -> None:
    letters, prompt = "abcdefg", [2, 1, 5]
    sizes = {
        "vocab_size": len(letters) + 1,
        "eos_token_id": len(letters),
        "bos_token_id": None,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    folder = models.write_model(tmp_path / "target", models.llama(**sizes), seed=2)
    write_tokenizer(folder, letters)
    target = models.read_model(folder)
    settings = {"target": "", "fingerprint": fingerprint(target), "draft_tokens": 3}
    drafter = random_drafter(target, num_layers=1, chains=True)
    save_flexdraft(drafter, tmp_path / "drafter", settings, dtype=torch.float32)
    arguments = {
        "model": str(folder),
        "max_model_len": 64,
        "max_num_seqs": 1000,
        "enable_prefix_caching": False,
        "speculative_config": draft(
            model=str(tmp_path / "drafter"),
            num_speculative_tokens=3,
            flex_decoding=mode,
        ),
    }
    job = Job([prompt] * num_samples, {"max_tokens": 3, "temperature": 1.0})
    with sampling_engine(arguments, prepare) as engine:
        sampled = engine.sample(job)
    logits = next_logits(target, prompt, 3)
    expected = joint([probabilities(each) for each in logits])
    assert p_value(sampled.token_ids, expected) > 0.001
    assert sampled.accepted[0] > 0.05 * len(sampled.token_ids)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"num_speculative_tokens": 9}, {}, "was trained for 8"),
        ({"page_size": 16}, {}, r"\['page_size'\] are about a drafter's own cache"),
        ({"eviction_policy": "heavy_hitter"}, {}, "by keys alone"),
        ({"drafter_type": "decoder"}, {}, "drafters are one of"),
        ({"model": TARGET, "drafter_type": "flexdraft"}, {}, "of model_type 'flexd"),
        ({"flex_decoding": "parallel"}, {}, "must know the bonus token"),
        (
            {"adaptive_draft_length": True},
            {"tensor_parallel_size": 2},
            "would wait for each other",
        ),
        ({}, {"model": "another"}, "was trained for the target 'books-9m'"),
    ],
)
def test_what_cannot_be_is_said(settings, arguments, message, tmp_path):
    if "model" in arguments:
        config = models.llama(vocab_size=4096, head_dim=32)
        arguments = {"model": str(models.write_model(tmp_path, config))}
        arguments |= {"skip_tokenizer_init": True}
    with pytest.raises(Exception, match=message):
        run_jobs(engine_args(**settings) | arguments, {})
