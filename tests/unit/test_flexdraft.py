"""FlexDraft's mask tokens, pages and checkpoints, against their definitions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import reference
from tests.support import models
from tests.support.flex_twin import (
    NUM_LAYERS,
    random_drafter,
    random_target,
    twin_logits,
)
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.errors import ConfigurationError, UnsupportedDrafterError
from vllm_budgetdraft.flexdraft.attention import MaskAttention
from vllm_budgetdraft.flexdraft.checkpoint import (
    fingerprint,
    is_flexdraft,
    load_flexdraft,
    save_flexdraft,
)
from vllm_budgetdraft.flexdraft.decoding import FlexDecoder
from vllm_budgetdraft.flexdraft.modeling import FlexDraft, TargetParts, begin_as_target
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.training.flexdraft import mask_hidden, target_states

FAMILIES = {
    "llama": models.llama(),
    "llama_biases": models.llama(attention_bias=True, mlp_bias=True),
    "mistral": models.mistral(),
    "qwen2": models.qwen2(),
    "qwen3": models.qwen3(),
}
NUM_DRAFTS = 4
PAGE_SIZE = 4
BUDGET = 16
SETTINGS = EvictionSettings(sink_tokens=3, local_tokens=4)


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def target(request):
    return models.random_model(request.param)


def selector(**settings: Any) -> PageSelector:
    return PageSelector(SETTINGS.model_copy(update=settings), PAGE_SIZE)


def seen_of(target: Any, prompt: Tensor, length: int) -> Tensor:
    """What a budget leaves of a context that goes on after its prompt."""
    _, keys, _ = target_states(target, prompt[None], NUM_LAYERS)
    visible = torch.stack([selector().visible(k, BUDGET)[0] for k in keys])
    assert not visible.all(), "the budget must leave something out"
    more = torch.ones(*visible.shape[:2], length - len(prompt), dtype=torch.bool)
    return torch.cat([visible, more], -1)


def logits_of(
    drafter: FlexDraft, hidden: Tensor, parts: TargetParts, bonus: Tensor
) -> Tensor:
    """Of greedy drafts from [B, k, hidden_size]: [B, k, V]."""
    found = []

    def pick(place: int, logits: Tensor) -> Tensor:
        assert place == len(found)
        found.append(logits)
        return logits.argmax(-1)

    drafter.draft(hidden, parts, bonus, pick)
    return torch.stack(found, 1)


def rounds(
    decoder: FlexDecoder, prompts: list[list[int]], max_new_tokens: int, mode: Any
) -> Iterator[tuple[list[int], list[int], Tensor, Tensor]]:
    """Of each: its prompt, its context and bonus token, drafts and confidences [k]."""
    drafted = []
    pick = decoder._pick

    def watched(*args: Any) -> Any:
        drafted.append(pick(*args))
        return drafted[-1]

    decoder._pick = watched
    written = decoder.generate(prompts, max_new_tokens, mode=mode)
    for row, prompt in enumerate(prompts):
        emitted = 0
        for drafts, accepted in zip(drafted, decoder.accepted[row], strict=False):
            context = prompt + written[row][:emitted]
            yield prompt, context, drafts.tokens[row], drafts.confidences[row]
            emitted += accepted + 1


VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"sees_bonus": True}, {"chains": True}],
    ids=["as_published", "sees_bonus", "chains"],
)


@VARIANTS
@pytest.mark.parametrize("is_budgeted", [False, True], ids=["all", "budget"])
def test_what_is_trained_is_the_definition(target, is_budgeted, variant):
    drafter = random_drafter(target, **variant)
    tokens = models.random_tokens(40)
    prompt, anchors = tokens[:30], torch.tensor([30, 33, 35])
    _, keys, values = target_states(target, tokens[None], NUM_LAYERS)
    budgeted = [selector().visible(k[:, :, :30], BUDGET) for k in keys]
    seen = [None, budgeted] if is_budgeted else [None]
    parts = TargetParts(target, NUM_LAYERS)
    block, bonus = NUM_DRAFTS + 1, parts.embed(tokens[None, anchors])
    hidden = mask_hidden(drafter, parts, keys, values, anchors, bonus, block, seen)
    hidden = hidden[-1, 0, :, 1:]
    logits = logits_of(drafter, hidden, parts, tokens[anchors])
    for index, anchor in enumerate(anchors.tolist()):
        expected = twin_logits(
            target,
            drafter,
            tokens[:anchor].tolist(),
            int(tokens[anchor]),
            NUM_DRAFTS,
            seen_of(target, prompt, anchor) if is_budgeted else None,
        )
        torch.testing.assert_close(logits[index], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_budgeted", [False, True], ids=["all", "budget"])
def test_paged_attention_is_the_definition(target, is_budgeted):
    """As in vLLM: a pool whose pages lie anywhere, and a table for each KV head."""
    drafter = random_drafter(target, sees_bonus=is_budgeted)
    parts = TargetParts(target, NUM_LAYERS)
    tokens = models.random_tokens(43)
    contexts = [tokens[:38], tokens[5:14]]
    prompt_length = 30
    num_kv_heads = drafter.num_kv_heads
    pages, tables = [], []
    chosen = selector()
    for layer in range(NUM_LAYERS):
        pool = torch.full((2, 40, PAGE_SIZE, num_kv_heads, 10), torch.nan)
        rows = []
        for index, context in enumerate(contexts):
            _, keys, values = target_states(target, context[None], NUM_LAYERS)
            count = -(-len(context) // PAGE_SIZE)
            blocks = torch.arange(count) * 2 + index
            spare = count * PAGE_SIZE - len(context)
            for half, states in enumerate((keys[layer], values[layer])):
                padded = torch.nn.functional.pad(
                    states[0].transpose(0, 1), (0, 0, 0, 0, 0, spare)
                )
                pool[half, blocks] = padded.unflatten(0, (count, PAGE_SIZE))
            row = blocks.expand(num_kv_heads, -1)
            if is_budgeted and index == 0:
                prompt_keys = keys[layer][0, :, :prompt_length]
                kept = chosen.select(prompt_keys, BUDGET)
                later = torch.arange(-(-prompt_length // PAGE_SIZE), count)
                order = torch.cat([kept, later.expand(num_kv_heads, -1)], -1)
                row = blocks[order]
            rows.append(row)
        longest = max(row.shape[-1] for row in rows)
        pad = torch.nn.functional.pad
        table = torch.stack([pad(r, (0, longest - r.shape[-1])) for r in rows])
        pages.append((pool[0].nan_to_num(7.0), pool[1].nan_to_num(7.0)))
        tables.append(table if is_budgeted else table[:, 0])
        held = [
            r.shape[-1] * PAGE_SIZE - (-len(c) % PAGE_SIZE)
            for r, c in zip(rows, contexts, strict=True)
        ]
    block = NUM_DRAFTS + 1
    positions = torch.cat([len(c) + torch.arange(block) for c in contexts])
    attend = MaskAttention(
        reference,
        pages,
        tables,
        torch.tensor(held),
        drafter.rotary(positions),
        block,
    )
    bonus = tokens[[38, 14]]
    masks = drafter.masks(parts.embed(bonus), block).flatten(0, 1)
    hidden = drafter(masks, parts, attend)
    hidden = hidden.unflatten(0, (2, block))[:, 1:]
    logits = logits_of(drafter, hidden, parts, bonus)
    for index, context in enumerate(contexts):
        seen = None
        if is_budgeted and index == 0:
            seen = seen_of(target, context[:prompt_length], len(context))
        expected = twin_logits(
            target, drafter, context.tolist(), int(bonus[index]), NUM_DRAFTS, seen
        )
        torch.testing.assert_close(logits[index], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "variant"),
    [
        ("sequential", {}),
        ("parallel", {}),
        ("parallel", {"chains": True}),
        ("parallel", {"sees_bonus": True, "drafts_blind": True, "chains": True}),
        ("auto", {"sees_bonus": True, "chains": True}),
    ],
)
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_decoding_drafts_as_defined(mode, variant, budget, target):
    """Of a batch whose rows have got different numbers of drafts accepted."""
    drafter = random_drafter(target, **variant)
    decoder = FlexDecoder(
        target,
        drafter,
        num_drafts=NUM_DRAFTS,
        selector=selector(),
        kv_budget=budget,
        confidence_threshold=0.0,
    )
    prompts = [models.random_tokens(n, seed=n).tolist() for n in (31, 8, 25)]
    for prompt, context, tokens, _ in rounds(decoder, prompts, 12, mode):
        seen = None
        if budget is not None and len(prompt) - 1 > budget:
            read = torch.tensor(prompt[:-1])
            seen = seen_of(target, read, len(context) - 1)
        logits = twin_logits(
            target,
            drafter,
            context[:-1],
            context[-1],
            NUM_DRAFTS,
            seen,
            is_told=mode != "parallel" or context == prompt,  # before any round
        )
        assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_masks_after_any_number_of_accepted_drafts_are_as_defined(threshold):
    """Which only drafts that are often right show: those of three tokens are."""
    small = {"vocab_size": 3, "bos_token_id": None, "eos_token_id": None}
    target = random_target(models.qwen3, **small)
    drafter = random_drafter(target)
    decoder = FlexDecoder(
        target, drafter, num_drafts=NUM_DRAFTS, confidence_threshold=threshold
    )
    prompts = [(models.random_tokens(n, seed=n) % 3).tolist() for n in range(2, 14)]
    found = list(rounds(decoder, prompts, 40, "parallel"))
    accepted = [count for row in decoder.accepted for count in row]
    assert len(found) > 150 and set(accepted) == set(range(NUM_DRAFTS + 1))
    for _, context, tokens, confidences in found:
        logits = twin_logits(target, drafter, context[:-1], context[-1], NUM_DRAFTS)
        assert tokens.tolist() == logits.argmax(-1).tolist()
        torch.testing.assert_close(
            confidences, logits.softmax(-1).amax(-1), rtol=1e-3, atol=1e-4
        )


def test_a_page_counts_as_one_token_of_the_policy():
    keys = torch.zeros(1, 2, 30, 6)
    keys[0, 0, 13] = 8.0  # page 3 of the first head, page 5 of the second
    keys[0, 1, 20] = 8.0
    keys[0, :, -1] = 1.0
    kept = selector().select(keys, 3 * PAGE_SIZE)
    assert kept.tolist() == [[[0, 3, 7], [0, 5, 7]]]
    visible = selector().visible(keys, 3 * PAGE_SIZE)
    assert visible[0, 0].nonzero().flatten().tolist() == [
        *range(4),
        *range(12, 16),
        28,
        29,
    ]
    assert visible[0, 1].nonzero().flatten().tolist() == [
        *range(4),
        *range(20, 24),
        28,
        29,
    ]


def test_sinks_and_window_in_pages():
    keys = torch.randn(2, 1, 41, 3)
    kept = selector(eviction_policy="sink_window").select(keys, 20)
    assert kept.flatten(0, 1).tolist() == [[0, 7, 8, 9, 10]] * 2
    every = selector(eviction_policy="keep_all")
    assert every.keeps_all and every.visible(keys, 8).all()


def test_a_prompt_below_the_budget_is_seen_whole():
    assert selector().visible(torch.randn(1, 2, 15, 3), BUDGET).all()


@pytest.mark.parametrize(
    "settings",
    [{"eviction_policy": "heavy_hitter"}, {"chunk_score": "last_queries"}],
)
def test_policies_that_need_attention_are_refused(settings):
    with pytest.raises(ConfigurationError, match="by keys alone; use one of"):
        selector(**settings)


def test_it_begins_as_the_target():
    """Mask tokens that are the target's own hidden states come out as its own."""
    target = random_target()
    drafter = FlexDraft(
        target.config, num_layers=3, calibration_rank=5, max_positions=64
    )
    begin_as_target(drafter, target)
    tokens = models.random_tokens(9)
    parts = TargetParts(target, 3)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    rotary = drafter.rotary(torch.arange(9))

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = qkv.transpose(0, 1).split((6, 2, 2))
        q, k = reference.rotate(q, *rotary), reference.rotate(k, *rotary)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        return attended[0].transpose(0, 1)

    hidden = drafter(parts.embed(tokens), parts, attend)
    expected = target.model(tokens[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    # Calibration adds nothing yet.
    logits = logits_of(drafter, hidden[None], parts, tokens[:1])[0]
    torch.testing.assert_close(logits, target.lm_head(hidden))


def saved(folder: Path, target: Any, **changes: Any) -> FlexDraft:
    drafter = random_drafter(target)
    settings = {
        "target": "a target",
        "fingerprint": fingerprint(target),
        "draft_tokens": NUM_DRAFTS,
    }
    save_flexdraft(drafter, folder, settings | changes, dtype=torch.float32)
    return drafter


def test_a_checkpoint_comes_back(tmp_path, target):
    drafter = saved(tmp_path, target)
    assert is_flexdraft(tmp_path)
    loaded = load_flexdraft(tmp_path, target, max_positions=512)
    for name, value in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_another_target_is_refused(tmp_path):
    target = random_target()
    saved(tmp_path, target)
    assert fingerprint(target) == fingerprint(random_target().bfloat16())
    other = models.random_model(models.llama(), seed=1)
    with pytest.raises(UnsupportedDrafterError, match="for the target 'a target'"):
        load_flexdraft(tmp_path, other, max_positions=64)


def test_broken_checkpoints_are_named(tmp_path):
    target = random_target()
    with pytest.raises(UnsupportedDrafterError, match=r"holds no config\.json"):
        load_flexdraft(tmp_path, target, max_positions=64)
    saved(tmp_path, target)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(UnsupportedDrafterError, match="does not hold the weights"):
        load_flexdraft(tmp_path, target, max_positions=64)
    del config["fingerprint"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedDrafterError, match=r"lacks the keys \['fingerpr"):
        load_flexdraft(tmp_path, target, max_positions=64)
    (tmp_path / "config.json").write_text("[]")
    assert not is_flexdraft(tmp_path)
