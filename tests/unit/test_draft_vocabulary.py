"""Drafters that draft some of their tokens alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from budgetdraft_kernels import fused, reference
from tests.support import models
from tests.support.drafting import Requests, build_proposer
from tests.support.fake_graph import FakeGraph
from vllm_budgetdraft.config import BudgetDraftConfig, settle
from vllm_budgetdraft.diagnosis import drafted_tokens
from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.drafter.draft_vocabulary import (
    FILE,
    read_draft_vocabulary,
    read_token_ids,
    write_draft_vocabulary,
)
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.drafter.packing import can_pack, weight_bytes
from vllm_budgetdraft.errors import ConfigurationError, UnsupportedDrafterError
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.drawn_logits import NEVER, DrawnLogits
from vllm_budgetdraft.proposer.picking import Drafts

SIZE, NUM_SLOTS = 20, 4
#: The likeliest first.
ORDERED = torch.randperm(models.VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
IDS = ORDERED[:SIZE].sort().values
CONFIGS = {"tied": True, "own_head": False}
every_kind = pytest.mark.parametrize("kind", ["greedy", "drawn", "cut"])
every_head = pytest.mark.parametrize("tied", CONFIGS.values(), ids=CONFIGS)
every_precision = pytest.mark.parametrize(
    "draft_dtype",
    [
        "float32",
        pytest.param("auto", marks=pytest.mark.skipif(not can_pack(), reason="x86")),
    ],
)


def write_drafter(folder: Path, tied: bool = True, size: int | None = SIZE) -> Path:
    """A random drafter, with the first ``size`` of the tokens above."""
    models.write_model(folder, models.llama(tie_word_embeddings=tied))
    if size:
        write_draft_vocabulary(folder, ORDERED[:size])
    return folder


def drafts_of(proposer: DraftProposer, kind: str) -> Drafts:
    requests = Requests(proposer)
    slots = [2, 0, 3]
    for slot in slots:
        requests.start(slot, 30 + slot, seed=slot)
    temperatures = None if kind == "greedy" else [1.0, 0.0, 0.7]
    top_k = [5, 0, 3] if kind == "cut" else None
    requests.drafts(slots, None, temperatures, top_k)  # the next overwrites these
    return requests.drafts(slots, None, temperatures, top_k)


def mask_others(drafter: Drafter, ids: Tensor) -> None:
    """The slow twin: logits of all tokens, and -inf of those that are left out."""
    logits = drafter.logits

    def masked(hidden: Tensor) -> Tensor:
        every = logits(hidden)
        return torch.full_like(every, -torch.inf).index_copy(1, ids, every[:, ids])

    drafter.logits = masked


def check_equal(found: Drafts, expected: Drafts) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.confidences, expected.confidences)
    assert (found.probabilities is None) == (expected.probabilities is None)
    if expected.probabilities is not None:
        torch.testing.assert_close(found.probabilities, expected.probabilities)


@every_kind
@every_head
@every_precision
def test_drafts_are_those_of_a_drafter_whose_other_logits_are_masked(
    tmp_path, kind, tied, draft_dtype
):
    settings = {"num_slots": NUM_SLOTS, "draft_dtype": draft_dtype}
    folder = write_drafter(tmp_path, tied)
    proposer = build_proposer(folder, **settings)
    twin = build_proposer(folder, draft_vocabulary_size=0, **settings)
    mask_others(twin.drafter, IDS)
    found, expected = (drafts_of(each, kind) for each in (proposer, twin))
    check_equal(found, expected)
    assert all(token in IDS for token in found.tokens.flatten())


@every_kind
def test_a_vocabulary_of_all_tokens_drafts_what_none_does(tmp_path, kind):
    """To the last bit: in a file of all, and where each token is named."""
    folder = write_drafter(tmp_path, size=models.VOCAB_SIZE)
    expected = build_proposer(folder, num_slots=NUM_SLOTS, draft_vocabulary_size=0)
    in_file, named = (build_proposer(folder, num_slots=NUM_SLOTS) for _ in range(2))
    assert in_file.drafter.draft_ids is None, "all of them need not be named"
    named.drafter.keep_rows(torch.arange(models.VOCAB_SIZE))
    tokens, confidences, probabilities = drafts_of(expected, kind)
    for proposer in (in_file, named):
        found = drafts_of(proposer, kind)
        assert torch.equal(found.tokens, tokens)
        assert torch.equal(found.confidences, confidences)
        if kind != "greedy":
            assert torch.equal(found.probabilities, probabilities)


@every_kind
def test_kernels_and_graphs_draft_the_same(tmp_path, kind):
    folder = write_drafter(tmp_path)
    settings = {"num_slots": NUM_SLOTS, "num_speculative_tokens": 2}
    expected = build_proposer(folder, **settings)
    graphs = build_proposer(folder, **settings)
    graphs.capture_graphs(FakeGraph)
    kernels = build_proposer(folder, attention_backend="triton", **settings)
    assert (expected.operations, kernels.operations) == (reference, fused)
    drafts = drafts_of(expected, kind)
    for proposer in (graphs, kernels):
        check_equal(drafts_of(proposer, kind), drafts)


@pytest.mark.parametrize("kind", ["drawn", "cut"])
def test_what_is_told_as_logits_is_what_is_told_as_probabilities(tmp_path, kind):
    folder = write_drafter(tmp_path)
    settings = {"num_slots": NUM_SLOTS}
    told = build_proposer(folder, tells_logits=True, **settings)
    told_drafts = drafts_of(told, kind)
    expected = drafts_of(build_proposer(folder, **settings), kind)
    assert torch.equal(told_drafts.tokens, expected.tokens)
    logits = told.drawn_logits.logits[[2, 0, 3]]
    temperatures = torch.tensor([1.0, 1.0, 0.7])[:, None, None]
    found = (logits / temperatures).softmax(-1)
    torch.testing.assert_close(found[[0, 2]], expected.probabilities[[0, 2]])
    others = torch.ones(models.VOCAB_SIZE, dtype=torch.bool)
    others[IDS] = False
    assert not found[..., others].any()


def test_what_was_certain_of_other_tokens_is_not_in_the_next_draft():
    """vLLM verifies a last token in the place of a draft, which may be any."""
    ids, slots = torch.tensor([1, 3]), torch.tensor([1, 0])
    logits = DrawnLogits(2, 2, 6, torch.float32, torch.device("cpu"), ids)
    stored = logits.logits
    assert stored.softmax(-1)[0].tolist() == [[0, 0.5, 0, 0.5, 0, 0]] * 2
    logits.store_certain(slots, torch.tensor([[0, 0], [5, 5]]))
    logits.begin(slots)
    for step in range(2):
        logits.store(slots, step, torch.randn(2, 2))
    logits.make_certain(slots, torch.tensor([[4, 4], [3, 1]]), torch.ones(2, 1).bool())
    one_hot = torch.eye(6)
    assert torch.equal(
        stored[slots].softmax(-1), one_hot[torch.tensor([[4, 4], [3, 1]])]
    )
    logits.begin(slots)
    logits.store(slots, 0, torch.zeros(2, 2))  # shorter than the one before
    assert stored[slots, 0].softmax(-1).tolist() == [[0, 0.5, 0, 0.5, 0, 0]] * 2
    logits.begin(slots)
    for step in range(2):
        logits.store(slots, step, torch.zeros(2, 2))
    assert (stored[slots][..., ids] == 0).all()
    assert (stored[slots][..., [0, 2, 4, 5]] == NEVER).all()


@pytest.mark.parametrize("has_graphs", [False, True])
def test_in_every_draft_what_is_told_is_what_was_drawn_from(tmp_path, has_graphs):
    """Whatever came in between: last tokens that are not drafted, shorter drafts."""
    folder, slots = write_drafter(tmp_path), [2, 0, 3]
    told = build_proposer(folder, num_slots=NUM_SLOTS, tells_logits=True)
    twin = build_proposer(folder, num_slots=NUM_SLOTS)
    others = [token for token in range(models.VOCAB_SIZE) if token not in IDS]
    temperatures = torch.tensor([1.0, 0.7, 0.3])
    everyone = []
    for proposer in (told, twin):
        if has_graphs:
            proposer.capture_graphs(FakeGraph)
        everyone.append(Requests(proposer))
        for slot in slots:
            everyone[-1].start(slot, 30 + slot, seed=slot)
    for turn, length in enumerate([4, 2, 3, 1, 4, 2]):
        last = torch.tensor(others[3 * turn : 3 * turn + 3])[:, None].expand(-1, 4)
        if turn % 2 == 0:
            told.drawn_logits.store_certain(torch.tensor(slots), last)
        drafts, expected = (
            each.drafts(slots, length, temperatures.tolist()) for each in everyone
        )
        assert torch.equal(drafts.tokens, expected.tokens)
        logits = told.drawn_logits.logits[slots, :length]
        found = (logits / temperatures[:, None, None]).softmax(-1)
        torch.testing.assert_close(found, expected.probabilities)
        where = torch.tensor([[turn % 3 == row] for row in range(3)])
        told.drawn_logits.make_certain(torch.tensor(slots), last[:, :length], where)


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    folder = write_drafter(tmp_path, size=None)
    (folder / FILE).with_suffix(".unfinished").mkdir()
    with pytest.raises(ConfigurationError, match="draft_vocabulary"):
        write_draft_vocabulary(folder, IDS)


def test_whoever_may_read_the_config_may_read_the_file(tmp_path):
    folder = write_drafter(tmp_path)
    modes = {(folder / name).stat().st_mode for name in (FILE, "config.json")}
    assert len(modes) == 1


def test_the_setting_cuts_the_file_to_its_likeliest(tmp_path):
    folder = write_drafter(tmp_path)
    config = read_drafter_config(folder)
    for size, count in ((None, SIZE), (7, 7), (SIZE, SIZE)):
        found = read_draft_vocabulary(folder, config, size)
        assert torch.equal(found, ORDERED[:count].sort().values)
    assert read_draft_vocabulary(folder, config, 0) is None
    assert len(build_proposer(folder, draft_vocabulary_size=7).drafter.head) == 7


def test_a_vocabulary_is_read_as_eagle_heads_have_it(tmp_path):
    offsets = IDS - torch.arange(SIZE)
    tensors = {"d2t": offsets, "t2d": torch.zeros(models.VOCAB_SIZE).bool()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_token_ids(tmp_path / "model.safetensors", models.VOCAB_SIZE)
    assert torch.equal(found, IDS)


def test_a_drafter_without_a_vocabulary_drafts_from_all(tmp_path):
    folder = write_drafter(tmp_path, size=None)
    assert read_draft_vocabulary(folder, read_drafter_config(folder)) is None
    with pytest.raises(UnsupportedDrafterError) as caught:
        build_proposer(folder, draft_vocabulary_size=5)
    assert "draft_vocabulary_size=5, but " in str(caught.value)
    assert "which says what is likeliest; write it with" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"other": IDS}, "has neither 'ids' nor 'd2t'"),
        ({"ids": IDS.float()}, "has 'ids' of type torch.float32 and shape [20]"),
        ({"ids": IDS.bool()}, "has 'ids' of type torch.bool"),
        ({"ids": IDS[None]}, "has 'ids' of type torch.int64 and shape [1, 20]"),
        ({"ids": IDS[:0]}, "has 'ids' of type torch.int64 and shape [0]"),
        ({"ids": torch.tensor([5, -1])}, "has the token ids -1 to 5"),
        ({"ids": torch.tensor([5, 97])}, "has the token ids 5 to 97"),
        ({"ids": torch.tensor([5, 3, 5])}, "has token ids twice"),
        ({"d2t": torch.tensor([0, 0, 95])}, "has the token ids 0 to 97"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused(tmp_path, tensors, said):
    folder = write_drafter(tmp_path)
    save_file(tensors, folder / FILE)
    with pytest.raises(UnsupportedDrafterError) as caught:
        build_proposer(folder)
    assert f"{folder / FILE} {said}" in str(caught.value)
    assert "whole numbers from 0 to 96, all different: write it" in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path):
    folder = write_drafter(tmp_path)
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UnsupportedDrafterError, match="cannot be read as safetensors"):
        build_proposer(folder)


def test_more_tokens_than_the_file_has_are_refused(tmp_path):
    with pytest.raises(UnsupportedDrafterError) as caught:
        build_proposer(write_drafter(tmp_path), draft_vocabulary_size=SIZE + 1)
    assert "draft_vocabulary_size=21 is above the 20 tokens of" in str(caught.value)


def test_tokens_that_the_target_lacks_are_refused(tmp_path):
    """A file that was written for another target."""
    with pytest.raises(UnsupportedDrafterError, match="from 0 to 49, all different"):
        build_proposer(write_drafter(tmp_path), vocab_size=50)


@every_head
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_bill_has_the_rows_that_are_kept(tmp_path, tied, is_packed):
    config = models.llama(tie_word_embeddings=tied)
    whole = weight_bytes(config, torch.float32, is_packed)
    fewer = weight_bytes(config, torch.float32, is_packed, IDS)
    row = config.hidden_size * (2 if is_packed else 4)
    # Of a tied embedding, rows to multiply with are copies, unless these are packed.
    gone = SIZE if tied and not is_packed else SIZE - models.VOCAB_SIZE
    assert fewer - whole == row * gone
    if not is_packed:
        drafter = build_proposer(write_drafter(tmp_path, tied)).drafter
        assert fewer == sum(p.nbytes for p in drafter.parameters())


def test_check_says_what_is_drafted_covers_and_saves(tmp_path):
    folder = write_drafter(tmp_path)
    config = settle(BudgetDraftConfig(model=str(folder), num_speculative_tokens=3), {})
    target = SimpleNamespace(
        get_vocab_size=lambda: models.VOCAB_SIZE, dtype=torch.float32
    )
    assert (
        drafted_tokens.describe(config, models.VOCAB_SIZE)
        == f"20 of 97 tokens ({FILE})"
    )
    others = [token for token in range(models.VOCAB_SIZE) if token not in IDS]
    written = [IDS[:3].tolist(), [int(IDS[0]), *others[:4]]]
    said = drafted_tokens.measure(config, written, target)
    assert said.startswith(
        "50.0% of the 8 tokens that the target wrote may be drafted; "
    )
    assert "3 drafts take" in said and "with all 97 tokens" in said
    every = config.model_copy(update={"draft_vocabulary_size": 0})
    assert drafted_tokens.measure(every, written, target) is None
    assert drafted_tokens.describe(every, models.VOCAB_SIZE).startswith(
        "all 97 tokens: "
    )


def test_other_software_does_not_take_the_file_for_weights():
    """By these endings vLLM and transformers look for weights."""
    from vllm_budgetdraft.drafter.draft_vocabulary import FILE

    assert not FILE.endswith((".safetensors", ".bin", ".pt", ".pth"))
