"""Two ranks: one drafts for both, and they must stay the same model."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.flex_twin import random_drafter
from tests.support.heads import write_head
from tests.support.processes import nothing, run_in_process
from tests.support.runner_v2 import in_every_process
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.flexdraft.checkpoint import fingerprint, save_flexdraft
from vllm_budgetdraft.flexdraft.decoding import FlexDecoder
from vllm_budgetdraft.flexdraft.pages import PageSelector

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32

#: A target that two ranks can share; models/books-9m has five heads.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
PROMPT_TOKENS = (5, 40, 150, 300)


def contexts(worker: Any) -> list[list[int]]:
    """What a rank takes for the contexts of its last batch."""
    runner, rows = worker.model_runner, len(PROMPT_TOKENS)
    if hasattr(runner, "req_states"):  # model runner V2
        lengths = runner.req_states.total_len.gpu[:rows].tolist()
        token_ids = runner.req_states.all_token_ids.gpu
    else:
        lengths = runner.input_batch.num_tokens_no_spec[:rows].tolist()
        token_ids = runner.input_batch.token_ids_cpu
    return [token_ids[row, :n].tolist() for row, n in enumerate(lengths)]


def keep_probabilities(worker: Any) -> None:
    """Has ranks other than the first verify without the drafts' probabilities."""
    runner = worker.model_runner
    if worker.rank and hasattr(runner, "drafter"):
        runner.drafter.take_probabilities = lambda: None
    elif worker.rank:
        share = runner.speculator._output.share

        def share_and_forget(*args: Any) -> None:
            share(*args)
            runner.speculator.draft_logits.zero_()

        runner.speculator._output.share = share_and_forget


def adapt_length(worker: Any, adapts: bool) -> None:
    """Adaptive length may find that no drafts are faster: nothing would be accepted."""
    drafter = getattr(worker.model_runner, "drafter", None)
    if drafter is None:  # model runner V2 has none
        return
    kept = vars(drafter).setdefault("adaptive_of_test", drafter._adaptive)
    drafter._adaptive = kept if adapts else None


def embeddings_are(worker: Any, rows: list[list[float]]) -> bool | None:
    """Whether the first rank's head has these embeddings; None of others."""
    import torch

    runner = worker.model_runner
    drafter = getattr(runner, "drafter", None) or runner.speculator
    core = getattr(drafter, "_core", None)
    if worker.rank or core is None:
        return None
    return torch.equal(core.drafter.embedding, torch.tensor(rows))


def prompts_of(vocab_size: int) -> list[list[int]]:
    tokens = (models.random_tokens(n, seed=n) for n in PROMPT_TOKENS)
    return [(each % vocab_size).tolist() for each in tokens]


def on_two_ranks(
    folder: str,
    prepare: Callable[[], None],
    head: str | None = None,
    flexdraft: str | None = None,
) -> dict[str, Any]:
    """Tokens, contexts by rank, and numbers of drafts of several jobs."""
    adapts = prepare is nothing and not (head or flexdraft)
    return run_in_process(
        *(generate, folder, adapts, head, flexdraft),
        prepare=prepare,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to ask the ranks
    )


def generate(
    folder: str, adapts: bool, head: str | None, flexdraft: str | None
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_model_len=512,
        block_size=BLOCK_SIZE,
        max_num_seqs=len(PROMPT_TOKENS),
        disable_log_stats=False,
        speculative_config={
            "method": "budgetdraft",
            "model": head or flexdraft or folder,
            "num_speculative_tokens": 4,
            "kv_budget": 64,
            "adaptive_draft_length": adapts,
        },
    )
    prompts = prompts_of(llm.model_config.get_vocab_size())
    no_drafts = {"extra_args": {"num_speculative_tokens": 0}}
    jobs: dict[str, dict[str, Any]] = {
        "plain": {"temperature": 0.0, **no_drafts},
        "greedy": {"temperature": 0.0},
        "drawn": {"temperature": 0.7},
        "adaptive": {"temperature": 0.7},
        "not shared": {"temperature": 0.7},
    }
    results: dict[str, Any] = {}
    if head or flexdraft:
        del jobs["adaptive"], jobs["not shared"]
    if head:
        rows = models.read_model(Path(folder)).get_input_embeddings().weight.tolist()
        results["embeddings"] = llm.collective_rpc(embeddings_are, args=(rows,))
    for name, settings in jobs.items():
        llm.collective_rpc(adapt_length, args=(name == "adaptive",))
        if name == "not shared":
            llm.collective_rpc(keep_probabilities)
        before = num_drafts(llm)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(
                max_tokens=60, ignore_eos=True, detokenize=False, **settings
            ),
            use_tqdm=False,
        )
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        drafts = num_drafts(llm) - before
        results[name] = tokens, llm.collective_rpc(contexts), drafts
    llm.llm_engine.engine_core.shutdown()  # else its processes stay
    return results


def num_drafts(llm: Any) -> Counter[str]:
    """Tokens drafted and tokens accepted so far."""
    names = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    drafted, accepted = (int(metrics[name].value) for name in names)
    return Counter(drafted=drafted, accepted=accepted)


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(nothing, id="V1"),
        pytest.param(in_every_process, id="V2", marks=pytest.mark.slow),
    ],
)
def test_ranks_accept_the_same_drafts(
    tmp_path: Path, prepare: Callable[[], None]
) -> None:
    folder = str(models.write_model(tmp_path, models.llama(**SIZES)))
    results = on_two_ranks(folder, prepare)
    assert results["greedy"][0] == results["plain"][0]
    for name in ("greedy", "drawn", "adaptive"):
        _, (first, second), drafts = results[name]
        assert drafts["drafted" if name == "adaptive" else "accepted"] > 0, name
        assert first == second, name
    # The test of the test: ranks whose probabilities differ go separate ways.
    _, (first, second), _ = results["not shared"]
    assert first != second


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(nothing, id="V1", marks=pytest.mark.slow),
        pytest.param(in_every_process, id="V2", marks=pytest.mark.slow),
    ],
)
def test_a_head_drafts_for_both_with_the_embeddings_of_both(
    tmp_path: Path, prepare: Callable[[], None]
) -> None:
    shape: dict[str, Any] = {**SIZES, "max_position_embeddings": 512}
    config = models.llama(**shape, num_hidden_layers=4)
    target = models.write_model(tmp_path / "target", config)
    head = write_head(tmp_path / "head", **shape)
    results = on_two_ranks(str(target), prepare, head=str(head))
    assert results["embeddings"] == [True, None]
    assert results["greedy"][0] == results["plain"][0]
    for name in ("greedy", "drawn"):
        _, (first, second), drafts = results[name]
        assert drafts["drafted"] > 100, name
        assert first == second, name


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(nothing, id="V1"),
        pytest.param(in_every_process, id="V2", marks=pytest.mark.slow),
    ],
)
def test_a_target_on_two_ranks_drafts_for_itself_on_both(
    tmp_path: Path, prepare: Callable[[], None]
) -> None:
    """Its drafts are those of one rank; of few tokens, so that many are accepted."""
    few = {"vocab_size": 8, "bos_token_id": None, "eos_token_id": None}
    config = models.llama(**SIZES, **few, attention_bias=True)
    folder = str(models.write_model(tmp_path / "target", config))
    target = models.read_model(Path(folder))
    settings = {"target": "", "fingerprint": fingerprint(target), "draft_tokens": 4}
    drafter = random_drafter(target, sees_bonus=True, chains=True)
    save_flexdraft(drafter, tmp_path / "flex", settings, dtype=torch.float32)
    results = on_two_ranks(folder, prepare, flexdraft=str(tmp_path / "flex"))
    assert results["greedy"][0] == results["plain"][0]
    for name in ("greedy", "drawn"):
        _, (first, second), drafts = results[name]
        assert drafts["drafted"] > 100, name
        assert first == second, name
    one = FlexDecoder(
        target,
        drafter,
        num_drafts=4,
        selector=PageSelector(EvictionSettings(), BLOCK_SIZE),
        kv_budget=64,
        confidence_threshold=0.0,
    )
    accepted = 0
    for prompt, written in zip(prompts_of(8), results["greedy"][0], strict=True):
        assert one.generate([[*prompt, written[0]]], 59) == [written[1:]]
        accepted += sum(one.accepted[0])
    found = results["greedy"][2]["accepted"]
    assert found > 10
    assert 0 <= accepted - found <= 4 * len(PROMPT_TOKENS), "of the last steps"
