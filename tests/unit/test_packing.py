"""Matrices packed for a CPU, against ``F.linear`` over the same ones in float16."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.support import models
from tests.support.drafting import build_proposer, ingested
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.diagnosis import memory
from vllm_budgetdraft.drafter.modeling import Drafter, initialise
from vllm_budgetdraft.drafter.packing import (
    can_pack,
    pack_matrices,
    weight_bytes,
)
from vllm_budgetdraft.training.views import View, continuation_hidden

CONFIGS = {
    "llama": models.llama(),
    "tied": models.llama(tie_word_embeddings=True),
    "biased": models.llama(attention_bias=True, mlp_bias=True),
    "qwen2": models.qwen2(),
    "qwen3_tied": models.qwen3(tie_word_embeddings=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
packs = pytest.mark.skipif(not can_pack(), reason="PyTorch has FBGEMM on x86 alone")


def random_drafter(config) -> Drafter:
    torch.manual_seed(0)
    drafter = Drafter(config, 64).eval().requires_grad_(False)
    initialise(drafter)
    for name, bias in drafter.named_parameters():
        if "bias" in name:
            bias.normal_()
    return drafter


def logits_of(drafter: Drafter, num_tokens: int) -> torch.Tensor:
    tokens = torch.arange(num_tokens)[None] % models.VOCAB_SIZE
    with torch.inference_mode():
        (hidden,) = continuation_hidden(drafter, tokens, [View([], [], 0)])
        return drafter.logits(hidden)


@packs
@every_config
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_packed_matrices_are_those_in_float16(config, num_tokens):
    drafter = random_drafter(config)
    twin = copy.deepcopy(drafter)
    for parameter in twin.parameters():
        if parameter.ndim == 2 and parameter is not twin.embedding:
            parameter.copy_(parameter.half())
    head = twin.head.half().float()
    twin.lm_head = torch.nn.Parameter(head, requires_grad=False)
    exact = logits_of(drafter, num_tokens)

    pack_matrices(drafter)
    assert drafter.is_packed
    packed = logits_of(drafter, num_tokens)
    torch.testing.assert_close(packed, logits_of(twin, num_tokens))
    assert not torch.equal(packed, exact)  # which rounding alone explains
    torch.testing.assert_close(packed, exact, rtol=0.01, atol=0.01)


@packs
@every_config
def test_no_matrix_is_kept_twice_but_the_embedding(config):
    drafter = random_drafter(config)
    size = weight_bytes(config, torch.float32, is_packed=False)
    assert size == sum(p.nbytes for p in drafter.parameters())

    matrices = sum(p.numel() for p in drafter.parameters() if p.ndim == 2)
    others = sum(p.nbytes for p in drafter.parameters() if p.ndim == 1)
    if config.tie_word_embeddings:
        matrices += drafter.embedding.numel()
    looked_up = drafter.embedding.numel()
    pack_matrices(drafter)
    kept = [p for p in drafter.parameters() if p.ndim == 2]
    assert [p is drafter.embedding for p in kept] == [True]
    expected = others + 4 * looked_up + 2 * (matrices - looked_up)
    assert weight_bytes(config, torch.float32, is_packed=True) == expected


@packs
@pytest.mark.parametrize("weight", [1e5, float("inf"), float("nan")])
def test_weights_that_float16_cannot_hold_stay_as_they_are(weight):
    """A NaN that packing made a number would no longer show as a fault."""
    drafter = random_drafter(CONFIGS["tied"])
    drafter.layers[1].down_weight[3, 2] = weight
    before = logits_of(drafter, 5)
    pack_matrices(drafter)
    assert not drafter.is_packed
    after = logits_of(drafter, 5)
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@packs
def test_auto_packs_and_a_dtype_by_name_does_not(drafter_folder):
    tokens = models.random_tokens(40)
    drafts = {}
    for draft_dtype in ("auto", "float32"):
        proposer = build_proposer(drafter_folder, draft_dtype=draft_dtype)
        assert proposer.drafter.is_packed == (draft_dtype == "auto")
        ingested(proposer, tokens[:-2])
        drafts[draft_dtype] = proposer.draft(
            torch.tensor([0]), tokens[None, -2:], torch.tensor([40])
        )
    first = [drafts[name].confidences[0, 0] for name in drafts]
    torch.testing.assert_close(*first, rtol=0.01, atol=0)
    assert first[0] != first[1]


def test_a_cpu_without_fbgemm_drafts_in_float32(drafter_folder, monkeypatch):
    engines = SimpleNamespace(supported_engines=["qnnpack"])
    monkeypatch.setattr(torch.backends, "quantized", engines)
    assert not can_pack()
    assert not build_proposer(drafter_folder, draft_dtype="auto").drafter.is_packed


@packs
@pytest.mark.parametrize(("device_type", "is_packed"), [("cpu", True), ("cuda", False)])
def test_check_bills_what_will_be_packed(
    drafter_folder, monkeypatch, device_type, is_packed
):
    asked = []
    monkeypatch.setattr(memory, "weight_bytes", lambda *of: asked.append(of) or 2**20)
    bill = memory.describe(
        BudgetDraftConfig(model=str(drafter_folder), num_speculative_tokens=4),
        max_model_len=512,
        max_num_seqs=2,
        target_dtype=torch.float32,
        device_type=device_type,
    )
    assert bill.startswith("drafter weights 1.0 MiB")
    assert [of[1:] for of in asked] == [(torch.float32, is_packed, None, False)]
