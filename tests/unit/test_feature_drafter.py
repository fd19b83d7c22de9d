"""EAGLE-3 heads: what they compute, in both layouts of the field."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import models
from tests.support.heads import (
    AUX_LAYERS,
    NUM_DRAFTED,
    write_head,
    write_speculators_head,
)
from vllm_budgetdraft.comparison.methods import default_kinds
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.diagnosis.memory import describe
from vllm_budgetdraft.drafter.feature_checkpoint import (
    is_feature_drafter,
    load_feature_drafter,
    read_feature_config,
    save_feature_drafter,
)
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.drafter.folder import load_for_drafting
from vllm_budgetdraft.drafter.packing import can_pack, pack_matrices, weight_bytes
from vllm_budgetdraft.errors import UnsupportedDrafterError

NUM_TOKENS, HIDDEN = 9, models.llama().hidden_size
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
}


@pytest.fixture
def embedding() -> Tensor:
    return torch.randn(97, HIDDEN, generator=torch.Generator().manual_seed(1))


def causal(drafter: FeatureDrafter, count: int):
    """Attention of a whole sequence to itself."""
    cos, sin = (x[:count, None] for x in drafter.rotary_rows)

    def attend(layer: int, qkv: Tensor, norms: Any) -> Tensor:
        heads, kv_heads = drafter.num_heads, drafter.num_kv_heads
        queries, keys, values = qkv.split((heads, kv_heads, kv_heads), -2)
        turned = [x * cos + x.roll(x.shape[-1] // 2, -1) * sin for x in (queries, keys)]
        q, k, v = (x.transpose(0, 1) for x in (*turned, values))
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    return attend


def plain_step(
    weights: dict[str, Tensor],
    layer: str,
    variant: dict[str, Any],
    embedded: Tensor,
    features: Tensor,
    drafter: FeatureDrafter,
) -> tuple[Tensor, Tensor]:
    """The head in plain words."""

    def rms(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[name], 1e-6)

    def times(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{layer}.{name}.weight"].T

    normed = rms(features, f"{layer}.hidden_norm.weight")
    residual = normed if variant.get("norm_before_residual") else features
    both = torch.cat([rms(embedded, f"{layer}.input_layernorm.weight"), normed], -1)
    qkv = torch.cat([times(both, f"self_attn.{part}_proj") for part in "qkv"], -1)
    heads = qkv.unflatten(-1, (-1, drafter.head_dim))
    attended = causal(drafter, len(embedded))(0, heads, None).flatten(-2)
    x = residual + times(attended, "self_attn.o_proj")
    h = rms(x, f"{layer}.post_attention_layernorm.weight")
    gated = F.silu(times(h, "mlp.gate_proj")) * times(h, "mlp.up_proj")
    x = x + times(gated, "mlp.down_proj")
    normed = rms(x, "norm.weight")
    return normed, normed if variant.get("norm_output") else x


@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        *(("specforge", variant) for variant in VARIANTS),
        # The others are of no layout of its.
        *(("speculators", variant) for variant in ("plain", "norm_before_residual")),
    ],
)
def test_a_head_computes_what_it_is_defined_as(layout, variant, tmp_path, embedding):
    variant = VARIANTS[variant]
    write = write_head if layout == "specforge" else write_speculators_head
    folder = write(tmp_path, rms_norm_eps=1e-6, **variant)
    if layout == "speculators":  # whose default is another
        variant = {"norm_before_residual": True, **variant}
    assert is_feature_drafter(folder)
    drafter = load_feature_drafter(folder, max_positions=32, embedding=embedding)
    assert drafter.aux_layers == AUX_LAYERS
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(NUM_TOKENS, 3 * HIDDEN, generator=generator)
    tokens = torch.randint(97, (NUM_TOKENS,), generator=generator)

    plain = states
    if variant.get("norm_before_fc"):
        plain = F.rms_norm(plain, plain.shape[-1:], weights["input_norm.weight"], 1e-6)
    if variant.get("fc_norm"):
        parts = [
            F.rms_norm(part, part.shape[-1:], weights[f"fc_norm.{i}.weight"], 1e-6)
            for i, part in enumerate(plain.chunk(3, -1))
        ]
        plain = torch.cat(parts, -1)
    plain = plain @ weights["fc.weight"].T
    features = drafter.combined(states)
    torch.testing.assert_close(features, plain)

    layer = "midlayer" if layout == "specforge" else "layers.0"
    embedded = embedding[tokens]
    expected = plain_step(weights, layer, variant, embedded, plain, drafter)
    found = drafter.step(tokens, features, causal(drafter, NUM_TOKENS))
    torch.testing.assert_close(found, expected)
    logits = drafter.logits(found[0])
    torch.testing.assert_close(logits, expected[0] @ weights["lm_head.weight"].T)
    ids = weights["d2t"] + torch.arange(NUM_DRAFTED)
    assert torch.equal(drafter.draft_ids, ids)
    assert drafter.embedding.data_ptr() == embedding.data_ptr(), "it is the target's"


def test_what_is_written_is_read_again(tmp_path, embedding):
    folder = write_head(tmp_path / "first", norm_before_residual=True, fc_norm=True)
    drafter = load_feature_drafter(folder, max_positions=8, embedding=embedding)
    save_feature_drafter(drafter, tmp_path / "second", dtype=torch.float32)
    again = load_feature_drafter(
        tmp_path / "second", max_positions=8, embedding=embedding
    )
    state = drafter.state_dict()
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    assert torch.equal(again.draft_ids, drafter.draft_ids)
    assert again.layers[0].adds_normed and again.aux_layers == AUX_LAYERS
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], v) for k, v in second.items())


def test_a_decoder_is_no_head(tmp_path):
    models.write_model(tmp_path, models.llama())
    assert not is_feature_drafter(tmp_path)


def test_the_bill_leaves_out_what_is_the_targets(tmp_path, embedding):
    config = read_feature_config(write_head(tmp_path))
    drafter = load_feature_drafter(tmp_path, max_positions=8, embedding=embedding)
    own = sum(p.nbytes for p in drafter.parameters()) - embedding.nbytes
    size = partial(weight_bytes, config, torch.float32, shares_embedding=True)
    assert size(is_packed=False, draft_ids=drafter.draft_ids) == own
    settings = BudgetDraftConfig(model=str(tmp_path), num_speculative_tokens=4)
    bill = describe(
        settings,
        max_model_len=256,
        max_num_seqs=2,
        target_dtype=torch.bfloat16,
        device_type="cuda",
        vocab_size=97,
    )
    assert bill.startswith(f"drafter weights {own / 2 / 2**20:.1f} MiB, draft cache")


@pytest.mark.skipif(not can_pack(), reason="x86")
def test_packed_matrices_compute_the_same_within_rounding(tmp_path, embedding):
    write_head(tmp_path)
    load = partial(load_feature_drafter, tmp_path, max_positions=32)
    plain, packed = load(embedding=embedding), load(embedding=embedding)
    pack_matrices(packed)
    assert packed.is_packed
    states = torch.randn(NUM_TOKENS, 3 * HIDDEN)
    tokens = torch.arange(NUM_TOKENS)
    features = plain.combined(states)
    torch.testing.assert_close(packed.combined(states), features, rtol=0.02, atol=0.02)
    found, expected = (
        each.step(tokens, features, causal(each, NUM_TOKENS))
        for each in (packed, plain)
    )
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def spoil_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in names:
        del weights[name]
    save_file(weights, folder / "model.safetensors")


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "another_kind": (
        lambda folder: spoil_config(folder, architectures=["LlamaForCausalLM"]),
        "is of no EAGLE-3 head: architectures=",
    ),
    "eagle_1": (
        lambda folder: spoil_config(
            folder, eagle_config={"use_aux_hidden_state": False}
        ),
        "heads that read the target's last state alone",
    ),
    "no_size": (
        lambda folder: spoil_config(folder, draft_vocab_size=-3),
        "draft_vocab_size=-3 is no size",
    ),
    "no_layers": (
        lambda folder: spoil_config(
            folder, eagle_config={"eagle_aux_hidden_state_layer_ids": ["a"]}
        ),
        "is no valid config",
    ),
    "no_d2t": (lambda folder: drop(folder, "d2t"), "lacks d2t, which says which"),
    "no_fc": (lambda folder: drop(folder, "fc.weight"), "lacks the weights fc.weight"),
    "other_width": (
        lambda folder: spoil_config(folder, target_hidden_size=32),
        "fc.weight has shape",
    ),
    "other_count": (
        lambda folder: spoil_config(folder, draft_vocab_size=39),
        "lm_head.weight has shape",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_heads_that_are_none_are_refused(spoil, said, tmp_path, embedding):
    spoil(write_head(tmp_path))
    with pytest.raises(UnsupportedDrafterError) as caught:
        load_feature_drafter(tmp_path, max_positions=8, embedding=embedding)
    assert said in str(caught.value)


def test_a_token_that_is_named_twice_is_refused(tmp_path, embedding):
    """Else what drafts are drawn from would not be what is told of them."""
    weights = load_file(write_head(tmp_path) / "model.safetensors")
    weights["d2t"][1] = weights["d2t"][0] - 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedDrafterError, match="of which 39 are different"):
        load_feature_drafter(tmp_path, max_positions=8, embedding=embedding)


def test_a_head_has_an_output_matrix_whatever_was_copied_of_its_target(
    tmp_path, embedding
):
    write_head(tmp_path, tie_word_embeddings=True)
    drafter = load_feature_drafter(tmp_path, max_positions=8, embedding=embedding)
    assert drafter.logits(torch.zeros(1, HIDDEN)).shape == (1, NUM_DRAFTED)
    drop(tmp_path, "lm_head.weight")
    with pytest.raises(UnsupportedDrafterError, match="lacks the weights lm_head"):
        load_feature_drafter(tmp_path, max_positions=8, embedding=embedding)


def test_without_anybodys_embeddings_a_head_is_refused(tmp_path):
    with pytest.raises(UnsupportedDrafterError, match="lacks the weights embed_tokens"):
        load_feature_drafter(write_head(tmp_path), max_positions=8)


def test_a_head_drafts_the_tokens_that_it_has(tmp_path, embedding):
    with pytest.raises(UnsupportedDrafterError, match="is an EAGLE-3 head, which has"):
        load_for_drafting(
            write_head(tmp_path),
            draft_vocabulary_size=5,
            max_positions=8,
            dtype=torch.float32,
            device=torch.device("cpu"),
            vocab_size=97,
            embedding=embedding,
        )


def test_vllms_own_method_for_a_drafter_is_measured_beside_ours(tmp_path):
    models.write_model(tmp_path / "decoder", models.llama())
    decoder, head = (
        default_kinds(str(folder))
        for folder in (tmp_path / "decoder", write_head(tmp_path / "head"))
    )
    assert "draft_model" in decoder and "eagle3" not in decoder
    assert "eagle3" in head and "draft_model" not in head
