"""Vocabularies that differ in padding, and those that differ in more."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import models
from tests.support.drafting import build_proposer
from tests.support.padded import FEWER, MORE, write_cut, write_padded
from tests.support.tiny_pair import LETTERS
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.drafter.vocabulary import check_vocabulary
from vllm_budgetdraft.errors import UnsupportedDrafterError
from vllm_budgetdraft.proposer.picking import Drafts

NUM_DRAFTS = 4


def refusal(drafter: Path, vocab_size: int, target: Path | str) -> str:
    with pytest.raises(UnsupportedDrafterError) as caught:
        check_vocabulary(drafter, vocab_size, str(target))
    message = str(caught.value)
    own = json.loads((drafter / "config.json").read_text())["vocab_size"]
    assert message.startswith(f"the drafter's vocab_size={own} differs from the ")
    assert f" target's {vocab_size}, and " in message
    assert message.endswith(
        "; use a drafter with this target's tokenizer in its folder"
    )
    return message


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return write_padded(tmp_path / "drafter", vocab_size=FEWER)


def test_equal_sizes_are_not_looked_into(drafter_folder):
    assert check_vocabulary(drafter_folder, models.VOCAB_SIZE, "./nowhere") is None


@pytest.mark.parametrize(("own", "targets"), [(FEWER, MORE), (MORE, FEWER)])
def test_padding_is_no_difference(own, targets, tmp_path):
    drafter = write_padded(tmp_path / "drafter", vocab_size=own)
    target = write_padded(tmp_path / "target", vocab_size=targets)
    assert check_vocabulary(drafter, targets, str(target)) == (
        f"vocab_size={own} in the drafter, {targets} in the target, of equal "
        f"tokenizers: ids from {FEWER} on are never drafted"
    )


def test_every_row_may_be_needed_but_none_may_lack(tmp_path):
    every = write_padded(tmp_path / "every", vocab_size=len(LETTERS) + 1)
    assert check_vocabulary(every, MORE, str(every)).endswith(
        "from 8 on are never drafted"
    )
    lacking = write_padded(tmp_path / "lacking", vocab_size=len(LETTERS))
    assert "ids up to 7, where one model has no row" in refusal(lacking, MORE, every)


def swapped(drafter: Path, target: Path) -> str:
    write_padded(target, vocab_size=MORE, letters="abcedfg")
    return "differ in 2 ids, the first of them 3: 'd' is not 'e'"


def longer(drafter: Path, target: Path) -> str:
    write_padded(target, vocab_size=MORE, letters=LETTERS + "h")
    return "differ in 2 ids, the first of them 7: '</s>' is not 'h'"


def with_a_token_added(drafter: Path, target: Path) -> str:
    write_padded(target, vocab_size=MORE)
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    (end,) = tokenizer["added_tokens"]
    tokenizer["added_tokens"].append(end | {"id": 8, "content": "<think>"})
    path.write_text(json.dumps(tokenizer))
    return "differ in 1 ids, the first of them 8: None is not '<think>'"


def without_a_tokenizer(drafter: Path, target: Path) -> str:
    write_padded(target, vocab_size=MORE)
    (drafter / "tokenizer.json").unlink()
    return f"{drafter} has no tokenizer.json to compare"


def with_one_that_is_none(drafter: Path, target: Path) -> str:
    write_padded(target, vocab_size=MORE)
    (drafter / "tokenizer.json").write_text("{}")
    return f"the tokenizer of {drafter} cannot be read ("


def with_a_target_that_has_none(drafter: Path, target: Path) -> str:
    models.write_model(target, models.llama(vocab_size=MORE))
    return f"the tokenizer of {target} cannot be read ("


@pytest.mark.parametrize(
    "spoil",
    [
        swapped,
        longer,
        with_a_token_added,
        without_a_tokenizer,
        with_one_that_is_none,
        with_a_target_that_has_none,
    ],
)
def test_whatever_else_differs_is_refused_and_named(
    spoil: Callable[[Path, Path], str], drafter, tmp_path
):
    words = spoil(drafter, tmp_path / "target")
    assert words in refusal(drafter, MORE, tmp_path / "target")


def test_two_qwen_folders_without_tokenizers_are_not_taken_for_equal(tmp_path):
    """For which transformers makes up equal ones, of one token."""
    for name, size in (("drafter", FEWER), ("target", MORE)):
        models.write_model(tmp_path / name, models.qwen2(vocab_size=size))
    assert "no tokenizer.json" in refusal(
        tmp_path / "drafter", MORE, tmp_path / "target"
    )


def drafts_of(
    folder: Path,
    contexts: torch.Tensor,
    temperatures: list[float] | None = None,
    **settings: int,
) -> Drafts:
    """Of contexts [B, T], each in a slot."""
    proposer = build_proposer(
        folder, num_slots=len(contexts), num_speculative_tokens=NUM_DRAFTS, **settings
    )
    for slot, context in enumerate(contexts):
        proposer.start_request(slot)
        proposer.ingest(slot, context[:-2])
    return proposer.draft(
        torch.arange(len(contexts)),
        contexts[:, -2:],
        torch.full((len(contexts),), contexts.shape[1]),
        temperatures=None if temperatures is None else torch.tensor(temperatures),
        validate=True,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("own", "targets"), [(FEWER, MORE), (MORE, FEWER)])
def test_drafts_are_those_of_the_model_without_padding(own, targets, tied, tmp_path):
    drafter = write_padded(
        tmp_path / "drafter", vocab_size=own, tie_word_embeddings=tied
    )
    alone = drafter
    if own > FEWER:
        alone = write_cut(tmp_path / "cut", drafter, FEWER)
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(FEWER, (20, 30), generator=generator)
    for temperatures in (None, [0.0, 0.5, 1.0, 2.0] * 5):
        expected = drafts_of(alone, contexts, temperatures)
        found = drafts_of(drafter, contexts, temperatures, vocab_size=targets)
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.confidences, expected.confidences)
    assert expected.probabilities.shape == (20, NUM_DRAFTS, FEWER)
    assert found.probabilities.shape == (20, NUM_DRAFTS, targets)
    known, never = found.probabilities.split((FEWER, targets - FEWER), -1)
    torch.testing.assert_close(known, expected.probabilities)
    assert not never.any()
    torch.testing.assert_close(known.sum(-1), torch.ones(20, NUM_DRAFTS))
    if own > FEWER:  # else nothing would have been cut
        assert (drafts_of(drafter, contexts).tokens >= FEWER).any()


def test_ids_without_a_row_of_the_drafters_own_are_read(drafter):
    contexts = torch.arange(MORE).repeat(2, 3)[:, :-1]
    contexts[1] = MORE - 1
    found = drafts_of(drafter, contexts, [1.0, 0.0], vocab_size=MORE)
    assert found.confidences.isfinite().all()
    assert (found.tokens < FEWER).all()


@pytest.mark.parametrize("size", [FEWER - 1, FEWER, MORE])
def test_rows_that_come_to_it_are_the_mean_of_its_own(size, drafter):
    own = load_drafter(drafter, max_positions=8)
    fitted = load_drafter(drafter, max_positions=8, vocab_size=size)
    assert fitted.config.vocab_size == size
    assert fitted.draft_vocab_size == min(size, FEWER)
    for name in ("embedding", "lm_head"):
        before, after = getattr(own, name), getattr(fitted, name)
        kept = min(size, FEWER)
        assert not after.requires_grad
        assert torch.equal(after[:kept], before[:kept])
        torch.testing.assert_close(after[kept:], before.mean(0).expand(size - kept, -1))
