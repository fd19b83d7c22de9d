"""The pretrained pair in vLLM: greedy answers are the target's, drawn ones its law.

Slow, and needs a package index where the pair was not fetched before.
"""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.distributions import p_value, sampling_engine
from tests.support.engines import Job, run_jobs
from vllm_budgetdraft.comparison.chats import chat_tokens
from vllm_budgetdraft.fetch import Pair, pretrained_pair

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

#: Enough for cells of the next token after one of two.
NUM_SAMPLES = 1500
QUESTIONS = [
    f"{ask} {topic}"
    for ask in (
        "Explain in two sentences what is special about",
        "Write a short story about",
        "Give me three tips for",
        "Write a Python function that has to do with",
        "List some facts about",
    )
    for topic in (
        "a lighthouse.",
        "baking bread.",
        "prime numbers.",
        "a long train journey.",
        "learning to swim.",
        "honey bees.",
        "saving money.",
        "the moon.",
    )
]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pretrained_pair("smollm2")


def engine_args(pair: Pair, *, drafts: bool = True) -> dict:
    ours = {
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "model": str(pair.drafter),
        "num_speculative_tokens": 4,
        "kv_budget": 64,
        "local_tokens": 16,
    }
    return {
        "model": str(pair.target),
        "max_model_len": 512,
        "max_num_seqs": 64,
        **({"speculative_config": ours} if drafts else {}),
    }


def test_forty_answers_are_plain_vllms(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    prompts = [chat_tokens(tokenizer, question) for question in QUESTIONS]
    job = Job(prompts, {"temperature": 0.0, "max_tokens": 64})
    plain, ours = (
        run_jobs(engine_args(pair, drafts=drafts), {"answers": job})["answers"]
        for drafts in (False, True)
    )
    assert len(set(map(tuple, plain.token_ids))) == len(prompts) == 40
    assert ours.token_ids == plain.token_ids
    assert ours.num_accepted_tokens > 0.05 * ours.num_draft_tokens


def test_drawn_answers_have_the_targets_distribution(pair):
    """Of the token that is drafted first, and of the next one after its likeliest."""
    prompt, first = before_a_choice(pair)
    with sampling_engine(engine_args(pair)) as engine:
        job = Job([prompt] * NUM_SAMPLES, {"temperature": 1.0, "max_tokens": 3})
        drawn = engine.sample(job)
    model = target_of(pair)
    given = [first]
    for _ in range(2):
        expected = next_logits(model, prompt + given).softmax(-1)
        after = len(given)
        chosen = [[o[after]] for o in drawn.token_ids if o[:after] == given]
        assert len(chosen) > 300
        assert p_value(chosen, expected) > 0.001
        given.append(int(expected.argmax()))
    # Both what the drafter proposed and what was drawn in its place.
    assert 0.1 < drawn.accepted[0] / drawn.num_drafts < 0.95


def before_a_choice(pair: Pair) -> tuple[list[int], int]:
    """Part of an answer after which a token is nearly certain, and the next one open.

    The first token of an output is not drafted; the second is what is looked at.
    """
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    prompt = chat_tokens(tokenizer, QUESTIONS[0])
    model = target_of(pair)
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=48, do_sample=False
        )[0]
        chances = model(ids[None]).logits[0].double().softmax(-1)
    # [T]: of the token at t + 1, and how open the one after it is.
    certain, entropy = chances.amax(-1), torch.special.entr(chances).sum(-1)
    places = [t for t in range(len(prompt), len(ids) - 2) if certain[t] > 0.9]
    place = max(places, key=lambda t: float(entropy[t + 1]))
    return ids[: place + 1].tolist(), int(ids[place + 1])


def target_of(pair: Pair) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()


@torch.inference_mode()
def next_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """float64 [V]."""
    return model(torch.tensor([tokens])).logits[0, -1].double()
