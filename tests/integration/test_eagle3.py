"""EAGLE-3 heads in vLLM: the drafts are those of vLLM's own ``eagle3``, where the
budget holds everything, and whatever happens the output is the target's.

Weights are random, so that a draft is seldom right: what is compared are drafts.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_sampling import check
from tests.support import models
from tests.support.distributions import (
    next_logits,
    sampling_engine,
    write_tokenizer,
)
from tests.support.engines import ENGINE_ARGS
from tests.support.heads import target_config, write_head
from tests.support.processes import nothing, run_in_process
from tests.support.runner_v2 import schedule_ahead
from tests.support.tiny_pair import (
    LETTERS,
    NUM_SAMPLES,
    NUM_TOKENS,
    PROMPT,
    SIZES,
    distribution,
    job,
)
from tests.support.tiny_pair import engine_args as tiny_engine_args
from vllm_budgetdraft.comparison.engines import check_engine
from vllm_budgetdraft.errors import UnsupportedDrafterError

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN, NUM_DRAFTS = 400, 4
SHAPE: dict[str, Any] = {"max_position_embeddings": 512, "head_dim": 32}
#: Context lengths, of 50 prompts.
LENGTHS = [5 + 6 * index for index in range(50)]
NEW_TOKENS = 12

#: Of each request, drafts in the order in which they were made.
Drafts = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    models.write_model(folder / "target", target_config(**SHAPE), seed=1)
    write_head(folder / "head", **SHAPE)
    return folder


def run(
    pair: Path,
    speculation: dict[str, Any] | None,
    prompts: list[list[int]],
    prepare: Callable[[], None] = nothing,
    **engine_args: Any,
) -> tuple[list[list[int]], Drafts]:
    """Tokens of each prompt, and drafts of each, in a process of its own.

    Args:
        prepare: what the process does first.
    """
    args = {
        "model": str(pair / "target"),
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "speculative_config": speculation,
        **engine_args,
    }
    return run_in_process(_run, args, prompts, prepare=prepare)


def _run(
    engine_args: dict[str, Any], prompts: list[list[int]]
) -> tuple[list[list[int]], Drafts]:
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    llm = LLM(**{**ENGINE_ARGS, "skip_tokenizer_init": True, **engine_args})
    noted: Drafts = {}
    propose: Callable[..., Any] = GPUModelRunner.propose_draft_token_ids

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = propose(self, *args, **kwargs)
        lists = drafts if isinstance(drafts, list) else drafts.tolist()
        for request_id, row in zip(self.input_batch.req_ids, lists, strict=False):
            if any(token >= 0 for token in row):
                noted.setdefault(request_id.split("-")[0], []).append(row)
        return drafts

    def note_v2(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        drafts = original(*args, **kwargs)
        lists = drafts.tolist()
        for request_id, row in zip(args[0].req_ids, lists, strict=True):
            if request_id in speculator.drafted:
                noted.setdefault(request_id.split("-")[0], []).append(row)
        return drafts

    GPUModelRunner.propose_draft_token_ids = note  # type: ignore[method-assign]
    runner: Any = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    if speculator := getattr(runner, "speculator", None):
        speculator.propose = partial(note_v2, speculator.propose)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
        ),
        use_tqdm=False,
    )
    return [list(each.outputs[0].token_ids) for each in outputs], noted


def ours(pair: Path, **settings: Any) -> dict[str, Any]:
    return {
        "method": "budgetdraft",
        "model": str(pair / "head"),
        "num_speculative_tokens": NUM_DRAFTS,
        "adaptive_draft_length": False,
        "draft_dtype": "float32",
        "kv_budget": MAX_MODEL_LEN,
        **settings,
    }


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [models.random_tokens(n, seed=n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def plain(pair: Path, prompts: list[list[int]]) -> list[list[int]]:
    return run(pair, None, prompts)[0]


@pytest.fixture(scope="module")
def drafted(pair: Path, prompts: list[list[int]]) -> tuple[list[list[int]], Drafts]:
    return run(pair, ours(pair), prompts, enable_prefix_caching=False)


def test_drafts_are_those_of_vllms_own(pair, prompts, plain, drafted):
    own = {
        "method": "eagle3",
        "model": str(pair / "head"),
        "num_speculative_tokens": NUM_DRAFTS,
    }
    args = {"enable_prefix_caching": False, "async_scheduling": False}
    tokens, expected = run(pair, own, prompts, **args)
    assert drafted[0] == tokens == plain
    found = drafted[1]
    assert found.keys() == expected.keys() and len(found) == len(prompts)
    for request_id, drafts in expected.items():
        # Ours ends where nothing more is to be verified.
        assert found[request_id] == drafts[: len(found[request_id])]
        assert len(found[request_id]) >= len(drafts) - 1


@pytest.mark.parametrize(
    "engine_args",
    [
        {"max_num_batched_tokens": 64},
        # For three requests of the longest: others are preempted, and begin anew.
        {"num_gpu_blocks_override": 40, "block_size": 32},
    ],
    ids=["chunked_prefill", "preemption"],
)
def test_drafts_are_the_same_however_prompts_come(
    pair, prompts, plain, drafted, engine_args
):
    tokens, drafts = run(
        pair, ours(pair), prompts, enable_prefix_caching=False, **engine_args
    )
    assert tokens == plain
    if "max_num_batched_tokens" in engine_args:
        assert drafts == drafted[1]
    else:
        assert drafts.keys() == drafted[1].keys()


@pytest.mark.parametrize("max_num_batched_tokens", [8, 512])
def test_model_runner_v2_drafts_the_same(
    pair, prompts, plain, drafted, max_num_batched_tokens
):
    """In the interpreter, so that there are few; prompts come whole, or in pieces."""
    few = [2, 0, 4]
    tokens, drafts = run(
        pair,
        ours(pair),
        [prompts[index] for index in few],
        schedule_ahead,
        enable_prefix_caching=False,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=3,
    )
    assert tokens == [plain[index] for index in few]
    assert len(drafts) == len(few)
    for place, index in enumerate(few):
        expected = drafted[1][str(index)]
        found = drafts[str(place)]
        assert found[: len(expected)] == expected[: len(found)]
        assert len(found) >= len(expected) - 1


@pytest.mark.parametrize("prepare", [nothing, schedule_ahead], ids=["v1", "v2"])
def test_who_finds_no_pages_begins_later_with_what_is_new(
    pair, prompts, plain, prepare
):
    """Of three requests at a time two have pages: 416 tokens of 512 bytes each."""
    few = [2, 0, 4, 1, 3]
    tokens, drafts = run(
        pair,
        ours(pair, pool_memory_gib=2.1 * 416 * 512 / 2**30),
        [prompts[index] for index in few],
        prepare,
        max_num_batched_tokens=24,  # so that they do not end together
        max_num_seqs=3,
    )
    assert tokens == [plain[index] for index in few]
    assert len(drafts) >= 4 and all(drafts.values())


@pytest.mark.parametrize("policy", ["chunk_retrieval", "heavy_hitter"])
def test_a_small_budget_changes_drafts_alone(pair, prompts, plain, drafted, policy):
    settings = {"kv_budget": 64, "recent_window": 48, "eviction_policy": policy}
    tokens, drafts = run(pair, ours(pair, **settings), prompts[-8:])
    assert tokens == plain[-8:]
    assert len(drafts) == 8 and all(drafts.values())
    assert list(drafts.values()) != [drafted[1][str(n)] for n in range(42, 50)]


def test_after_a_cached_prefix_it_drafts_from_what_is_new(pair, prompts, plain):
    """Of which it knows the last tokens at least: vLLM computes these."""
    twice = [prompts[40], prompts[41], prompts[40], prompts[41]]
    tokens, drafts = run(
        pair, ours(pair), twice, enable_prefix_caching=True, max_num_seqs=1
    )
    assert tokens == [plain[40], plain[41]] * 2
    assert len(drafts) == 4
    first, again = drafts["0"], drafts["2"]
    assert len(first) == len(again) and first != again


def test_what_a_head_asks_of_the_target_tells_compiled_graphs_apart(pair, tmp_path):
    """And nothing else that is set: each other budget would compile anew."""
    decoder = models.write_model(tmp_path / "decoder", target_config(**SHAPE))
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    other = write_head(tmp_path / "other", **SHAPE, eagle_config=layers)

    def hash_of(**settings: Any) -> str:
        args = {"model": str(pair / "target"), "max_model_len": MAX_MODEL_LEN}
        speculation = ours(pair, **settings)
        config = check_engine({**args, "speculative_config": speculation})
        return str(config.speculative_config.compute_hash())

    head = hash_of()
    assert head == hash_of(kv_budget=64)
    assert len({head, hash_of(model=str(decoder)), hash_of(model=str(other))}) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"target_hidden_size": 64},
            "is an EAGLE-3 head of another target: its states",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}},
            "of 3 layers of its target, [1, 2, 9], and this target has 4",
        ),
        ({"eagle_config": {}}, "of 3 layers of its target, [2, 2, 1], and this"),
    ],
)
def test_heads_of_other_targets_are_refused_before_weights_load(
    pair, tmp_path, changes, said
):
    head = write_head(tmp_path, **SHAPE, **changes)
    args = {"model": str(pair / "target"), "max_model_len": MAX_MODEL_LEN}
    with pytest.raises(UnsupportedDrafterError) as caught:
        check_engine({**args, "speculative_config": ours(pair, model=str(head))})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "num_samples"),
    [
        (nothing, NUM_SAMPLES),
        # In the interpreter sampling takes long.
        pytest.param(schedule_ahead, 1_000, marks=pytest.mark.slow),
    ],
    ids=["v1", "v2"],
)
def test_samples_have_the_targets_distribution(tmp_path, prepare, num_samples):
    shape = {**SIZES, "num_hidden_layers": 4}
    target = models.write_model(tmp_path / "target", models.llama(**shape), seed=2)
    write_tokenizer(target, LETTERS)
    head = {k: v for k, v in SIZES.items() if k not in ("bos_token_id", "eos_token_id")}
    folder = write_head(tmp_path / "head", **head, draft_vocab_size=5)
    logits = next_logits(models.read_model(target), PROMPT, NUM_TOKENS)
    with sampling_engine(tiny_engine_args(target, folder), prepare) as engine:
        sampled = engine.sample(job(num_samples, temperature=1.0))
    check(sampled, distribution(logits))
