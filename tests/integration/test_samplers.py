"""vLLM's samplers under speculation: what is wrong with them, and right with ours."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.patches import make_patched_config, theirs

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def config() -> Any:
    return make_patched_config()


VOCAB_SIZE = 8


def logits_of(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, VOCAB_SIZE, generator=generator)


def sampling(config: Any, batch: int, **settings: Any) -> Any:
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    nothing = torch.zeros(batch)
    given = SamplingMetadata(
        temperature=torch.ones(batch),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing + 1,
        output_token_ids=[[] for _ in range(batch)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    return replace(given, **settings)


def verification(drafts: list[list[int]]) -> Any:
    """vLLM's metadata of drafts whose logits come with one more row each."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    metadata = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    rows = iter(range(sum(len(each) + 1 for each in drafts)))
    of_drafts, of_bonus = [], []
    for each in drafts:
        of_drafts += [next(rows) for _ in each]
        of_bonus.append(next(rows))
    metadata.target_logits_indices = torch.tensor(of_drafts)
    metadata.bonus_logits_indices = torch.tensor(of_bonus)
    return metadata


def samplers(is_ours: bool) -> tuple[Any, Any]:
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    from vllm_budgetdraft.vllm_integration.patching import specialise
    from vllm_budgetdraft.vllm_integration.v1.samplers import (
        DraftingSampler,
        DraftVerifier,
    )

    sampler = Sampler()
    verifier = RejectionSampler(sampler)
    if is_ours:
        specialise(sampler, DraftingSampler)
        specialise(verifier, DraftVerifier)
    return sampler, verifier


def test_a_seed_gives_the_tokens_that_it_gives_one_by_one(config):
    """Rows with and without drafts of one request: the same noise, turn by turn."""
    drafts = 3
    logits = logits_of(drafts + 1)

    def one_by_one() -> list[int]:
        generator = torch.Generator().manual_seed(7)
        sampler, _ = samplers(is_ours=False)
        each = sampling(config, 1, generators={0: generator})
        return [
            int(sampler(row[None].clone(), each).sampled_token_ids) for row in logits
        ]

    def verified(is_ours: bool, proposed: list[int]) -> list[int]:
        _, verifier = samplers(is_ours)
        generator = torch.Generator().manual_seed(7)
        given = sampling(config, 1, generators={0: generator})
        metadata = verification([proposed])
        output = verifier(metadata, None, logits.clone(), given).sampled_token_ids
        return output[output >= 0].tolist()

    expected = one_by_one()
    assert verified(True, expected[:3]) == expected
    wrong = [expected[0], (expected[1] + 1) % VOCAB_SIZE, expected[2]]
    assert verified(True, wrong) == expected[:2]
    seen = {tuple(verified(False, [i, j, 0])) for i in range(8) for j in range(8)}
    assert not all(each == tuple(expected[: len(each)]) for each in seen)


def processed(config: Any, is_ours: bool, **settings: Any) -> Tensor:
    """Logits [3, V] of the drafts of two requests, as verification sees them."""
    _, verifier = samplers(is_ours)
    metadata = verification([[1, 2], [3]])
    given = sampling(config, 2, **settings)
    return verifier.apply_logits_processors(logits_of(3), given, metadata)


def test_verification_heeds_min_p_and_logit_bias_where_vllms_does_not(config):
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import (
        LogitBiasLogitsProcessor,
        MinPLogitsProcessor,
    )
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    kinds = [
        kind(config, torch.device("cpu"), False)
        for kind in (LogitBiasLogitsProcessor, MinPLogitsProcessor)
    ]
    asked = [
        SamplingParams(logit_bias={5: 50.0}),
        SamplingParams(min_p=0.2, temperature=0.5),
    ]
    update = BatchUpdate(
        batch_size=2,
        removed=[],
        added=[(row, params, [], []) for row, params in enumerate(asked)],
        moved=[],
    )
    for kind in kinds:
        kind.update_state(update)
    settings = {
        "logitsprocs": LogitsProcessors(kinds),
        "temperature": torch.tensor([1.0, 0.5]),
    }
    raw = logits_of(3)
    assert torch.equal(processed(config, False, **settings), raw)
    found = processed(config, True, **settings)
    biased = raw[:2].clone()
    biased[:, 5] += 50
    assert torch.equal(found[:2], biased)
    likely = (raw[2] / 0.5).softmax(0)
    left = likely >= 0.2 * likely.max()
    assert torch.equal(found[2] > -torch.inf, left)
    assert torch.equal(found[2][left], raw[2][left])


@pytest.mark.parametrize("seed", range(20))
def test_min_p_leaves_what_it_leaves_at_the_temperature_of_each_row(seed, config):
    """Greedy rows among them, whose temperature is 0."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    rng = random.Random(seed)
    temperatures = [rng.choice([0.0, 0.3, 1.0, 2.0]) for _ in range(2)] + [1.0]
    asked = [rng.choice([0.0, 0.05, 0.4]) for _ in range(2)] + [0.2]
    added = [
        (row, SamplingParams(min_p=each), [], []) for row, each in enumerate(asked)
    ]
    kind = MinPLogitsProcessor(config, torch.device("cpu"), False)
    kind.update_state(BatchUpdate(batch_size=3, removed=[], added=added, moved=[]))
    given = sampling(
        config,
        3,
        all_random=False,
        temperature=torch.tensor(temperatures),
        logitsprocs=LogitsProcessors([kind]),
    )
    drafts = [[1] * rng.randint(0, 3), [2], [3, 4]]
    rows = [row for row, each in enumerate(drafts) for _ in each]
    raw = logits_of(len(rows), seed)
    _, verifier = samplers(is_ours=True)
    metadata = verification(drafts)
    found = verifier.apply_logits_processors(raw.clone(), given, metadata)
    for row, before, after in zip(rows, raw, found, strict=True):
        likely = (before / (temperatures[row] or 1)).softmax(0)
        left = likely >= asked[row] * likely.max()
        assert torch.equal(after, before.masked_fill(~left, -torch.inf))


def test_named_logprobs_of_every_token_where_vllm_has_those_of_the_first(config):
    """Of two requests the first names tokens, and the second wants the likeliest."""
    drafts = [[1, 2], [3]]
    logits = logits_of(5)
    given = sampling(
        config,
        2,
        temperature=None,
        all_greedy=True,
        all_random=False,
        logprob_token_ids={0: [4, 6]},
        max_num_logprobs=2,
    )

    def gathered(is_ours: bool) -> Any:
        _, verifier = samplers(is_ours)
        return verifier(verification(drafts), None, logits.clone(), given)

    with pytest.raises(RuntimeError, match="shape"):
        gathered(False)
    ids = gathered(True).logprobs_tensors.logprob_token_ids
    per_request = len(ids) // 2
    assert ids[:per_request, 1:].tolist() == [[4, 6]] * per_request
    likeliest = logits[3].topk(2).indices.tolist()
    assert ids[per_request, 1:].tolist() == likeliest


def test_of_a_batch_each_has_the_logprobs_that_it_asked_for(config):
    logits = logits_of(2)
    given = sampling(config, 2, logprob_token_ids={0: [4, 6]}, max_num_logprobs=2)
    likeliest = logits[1].topk(2).indices.tolist()

    def ids(is_ours: bool) -> list[list[int]]:
        sampler, _ = samplers(is_ours)
        tensors = sampler(logits.clone(), given).logprobs_tensors
        return tensors.logprob_token_ids[:, 1:].tolist()

    assert ids(True) == [[4, 6], likeliest]
    assert ids(False)[1] != likeliest


def test_a_draft_of_minus_one_is_looked_for_beside_its_row(config):
    """Of certain drafts, whose row before has a token that is sure to be accepted."""
    from vllm.v1.sample import rejection_sampler

    def verify(function: Any) -> list[int]:
        torch.manual_seed(0)
        target = torch.full((2, VOCAB_SIZE), -torch.inf)
        target[0, VOCAB_SIZE - 1] = target[1, 2] = 0.0
        drawn = torch.full((2, VOCAB_SIZE), 1 / VOCAB_SIZE)
        output = function(
            torch.tensor([VOCAB_SIZE - 1, -1], dtype=torch.int32),
            [1, 1],
            1,
            torch.tensor([1, 2], dtype=torch.int32),
            drawn,
            target,
            torch.tensor([[0], [0]], dtype=torch.int32),
            sampling(config, 2),
        )
        return output[1].tolist()

    assert verify(rejection_sampler.rejection_sample) == [2, -1]
    assert verify(theirs("rejection_sample")) != [2, -1]


def test_temperatures_of_drafts_are_lost(config):
    expand = theirs("expand_batch_to_tokens")
    arguments = torch.tensor([0.5, 2.0]), torch.tensor([2, 3], dtype=torch.int32), 3
    # vLLM's kernels for CPUs know one type of each argument, and write to a copy of
    # another: what was in memory before stays there.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", Tensor.new_zeros)
        assert expand(*arguments).tolist() == [0.0, 0.0, 0.0]
    from vllm.v1.sample import rejection_sampler

    found = rejection_sampler.expand_batch_to_tokens(*arguments)
    assert found.tolist() == [0.5, 0.5, 2.0]
