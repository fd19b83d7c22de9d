"""Whatever a request asks for, it is answered as plain vLLM answers it alone.

Token for token, texts, reasons to stop and logprobs; beside a request of every other
kind, too. ``tests.support.sampling_fields`` has the kinds. Plain vLLM is not asked for
the whole batch: there, ``logprobs`` beside ``logprob_token_ids`` come out wrong.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.engines import DRAFTER, ENGINE_ARGS, book_tokens
from tests.support.processes import nothing, run_in_process
from tests.support.runner_v2 import schedule_ahead
from tests.support.sampling_fields import CHANGES_NOTHING, COMPARED, NOT_COMPARED

pytestmark = pytest.mark.vllm

Answers = dict[str, Any]

NUM_TOKENS = 20
GREEDY = "greedy"
KINDS: dict[str, dict[str, Any]] = {
    GREEDY: {},
    **COMPARED,
    **{
        f"thinking, {n} tokens": {"thinking_token_budget": n, "max_tokens": 60}
        for n in (0, 1, 2, 5, 8)
    },
}
REFUSED = "refused"
DRAFTING = {
    "method": "budgetdraft",
    "adaptive_draft_length": False,
    "model": DRAFTER,
    "num_speculative_tokens": 4,
    "kv_budget": 64,
    "recent_window": 64,
}


def test_somebody_looked_at_every_field():
    from vllm import SamplingParams

    assert not COMPARED.keys() & NOT_COMPARED.keys()
    unknown = (
        set(SamplingParams.__struct_fields__) - COMPARED.keys() - set(NOT_COMPARED)
    )
    assert not unknown, "see tests/support/sampling_fields.py"


def answers(
    speculative_config: dict[str, Any] | None,
    kinds: dict[str, dict[str, Any]],
    prepare: Callable[[], None] = nothing,
) -> tuple[Answers, Answers, Answers]:
    """Of an engine in a process of its own.

    Returns:
        Of each kind alone, of all at once, and of all at once without drafts.
    """
    return run_in_process(_answers, speculative_config, kinds, prepare=prepare)


def _answers(
    speculative_config: dict[str, Any] | None,
    kinds: dict[str, dict[str, Any]],
) -> tuple[Answers, Answers, Answers]:
    from vllm import LLM
    from vllm.config.reasoning import ReasoningConfig

    args = {
        **ENGINE_ARGS,
        "max_model_len": 256,
        "max_num_seqs": 64,
        "block_size": 32,
        # Greedy begins to think in its eighth token.
        "reasoning_config": ReasoningConfig(
            reasoning_start_str=" the", reasoning_end_str=", I said"
        ),
        "speculative_config": speculative_config,
    }
    llm = LLM(**args)
    alone: Answers = {}
    for name, sampling in kinds.items():
        try:
            (alone[name],) = _generate(llm, [sampling])
        except Exception:  # of several kinds, by what refuses it
            alone[name] = REFUSED
    taken = [name for name, answer in alone.items() if answer != REFUSED]
    none = {"extra_args": {"num_speculative_tokens": 0}}
    batch, undrafted = (
        _generate(llm, [kinds[name] | extra for name in taken]) for extra in ({}, none)
    )
    return (
        alone,
        dict(zip(taken, batch, strict=True)),
        dict(zip(taken, undrafted, strict=True)),
    )


def _generate(llm: Any, kinds: list[dict[str, Any]]) -> list[Any]:
    outputs = llm.generate(
        [{"prompt_token_ids": book_tokens(40)}] * len(kinds),
        [_params(**sampling) for sampling in kinds],
        use_tqdm=False,
    )
    return [_answer(output) for output in outputs]


def _params(**sampling: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    for field, make in (
        ("structured_outputs", StructuredOutputsParams),
        ("repetition_detection", RepetitionDetectionParams),
    ):
        if field in sampling:
            sampling[field] = make(**sampling[field])
    return SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_TOKENS, **sampling})


def _answer(output: Any) -> dict[str, Any]:
    """What a client sees of it; logprobs by what they are of, apart."""
    found: dict[str, Any] = {"outputs": [], "logprobs": {}}
    for index, each in enumerate(output.outputs):
        found["outputs"].append(
            (tuple(each.token_ids), each.text, each.finish_reason, each.stop_reason)
        )
        found["logprobs"] |= _logprobs(each.logprobs, f"output {index}")
    found["logprobs"] |= _logprobs(output.prompt_logprobs, "prompt")
    scores = getattr(output, "prompt_token_id_logprobs", None)
    if scores is not None:
        for place, score in enumerate(scores.flatten().tolist()):
            found["logprobs"]["prompt scores", place] = score
    return found


def _logprobs(positions: Any, where: str) -> dict[Any, float]:
    found = {}
    for place in range(len(positions or [])):
        for token, logprob in (positions[place] or {}).items():
            found[where, place, token, logprob.rank] = logprob.logprob
    return found


def check(name: str, answer: Any, expected: Any) -> None:
    if REFUSED in (answer, expected):
        assert answer == expected, name
        return
    assert answer["outputs"] == expected["outputs"], name
    assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4), name


@pytest.fixture(scope="module")
def plain() -> Answers:
    return answers(None, KINDS)[0]


def test_every_kind_is_answered_as_plain_vllm_answers_it_alone(plain):
    alone, batch, undrafted = answers(DRAFTING, KINDS)
    for name in KINDS:
        check(name, alone[name], plain[name])
    for name in batch:
        check(f"{name}, in the batch", batch[name], plain[name])
        check(f"{name}, in a batch without drafts", undrafted[name], plain[name])
    # What it takes for all this to say something.
    of_named = [key for key in plain["logprob_token_ids"]["logprobs"] if key[2] == 6]
    assert len(of_named) == NUM_TOKENS
    same = {name for name in COMPARED if plain[name] == plain[GREEDY]}
    assert same == CHANGES_NOTHING
    refused = {name for name in COMPARED if plain[name] == REFUSED}
    assert refused == {
        "trace_decode_token_ids",  # by any speculation, and by an engine without traces
        "prompt_logprob_token_ids",  # by model runner V1
        "prompt_logprob_start",
    }
    assert batch.keys() == KINDS.keys() - refused
    ends = {plain[name]["outputs"][0] for name in KINDS if "thinking" in name}
    assert len(ends) == 6, "of each budget another one"


@pytest.mark.slow
def test_so_is_every_greedy_kind_in_runner_v2():
    """Its seeds are others', and its interpreted kernels have no top_k and top_p."""
    greedy = {name: each for name, each in KINDS.items() if not each.get("temperature")}
    plain = answers(None, greedy, schedule_ahead)[0]
    alone, batch, _ = answers(DRAFTING, greedy, schedule_ahead)
    for name in greedy:
        check(name, alone[name], plain[name])
    for name, answer in batch.items():
        check(f"{name}, in the batch", answer, plain[name])
    assert batch.keys() == greedy.keys() - {"trace_decode_token_ids"}
