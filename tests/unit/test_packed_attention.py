"""Attention over packed prompts, by PyTorch and by xFormers."""

import pytest
import torch
from torch import Tensor

from tests.support.fake_gpu import cpus_are_gpus
from vllm_budgetdraft.attention import packed

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 16
#: Query and key tokens of each prompt: whole, one token of many, longer than a block of
#: masked rows, and a part of one that was read before.
PROMPTS = {
    "one": ([3], [3]),
    "one_in_part": ([63], [100]),
    "one_token": ([1], [100]),
    "blocks": ([600], [700]),
    "several": ([3, 1, 300, 5, 256], [3, 9, 400, 5, 257]),
}
#: Rounding of some hundred terms in float32.
TOLERANCE = 2e-6

prompts = pytest.mark.parametrize("lengths", PROMPTS.values(), ids=PROMPTS.keys())


def random_batch(lengths: tuple[list[int], list[int]], dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(0)
    query_lengths, key_lengths = lengths
    shapes = (
        (sum(query_lengths), NUM_HEADS, HEAD_DIM),
        (sum(key_lengths), NUM_KV_HEADS, HEAD_DIM),
        (sum(key_lengths), NUM_KV_HEADS, HEAD_DIM),
    )
    return [
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    ]


def naive(queries, keys, values, query_lengths, key_lengths) -> Tensor:
    """Token by token, head by head, in float64."""
    rows, key_end = [], 0
    tokens = iter(queries.double())
    for num_queries, num_keys in zip(query_lengths, key_lengths, strict=True):
        key_start, key_end = key_end, key_end + num_keys
        for seen in range(num_keys - num_queries + 1, num_keys + 1):
            k, v = (x[key_start : key_start + seen].double() for x in (keys, values))
            k, v = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 1) for x in (k, v))
            weights = torch.einsum("hd,shd->hs", next(tokens), k) / HEAD_DIM**0.5
            rows.append(torch.einsum("hs,shd->hd", weights.softmax(-1), v))
    return torch.stack(rows).to(queries.dtype)


def bottom_right_masked(query: Tensor, key: Tensor, value: Tensor, attn_bias) -> Tensor:
    """What ``memory_efficient_attention`` computes, [1, tokens, G, H / G, D] each."""
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (query, key, value))
    bias = attn_bias.materialize((query.shape[1], key.shape[1]))
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2, 4)


@prompts
def test_torch_equals_attention_token_by_token(lengths):
    batch = random_batch(lengths, torch.float32, "cpu")
    attended = packed.attend_with_torch(*batch, *lengths)
    expected = naive(*batch, *lengths)
    torch.testing.assert_close(attended, expected, rtol=0, atol=TOLERANCE)


@prompts
def test_what_xformers_is_asked_for_is_the_same(lengths, monkeypatch):
    """With its own masks, and its kernel, which needs a GPU, played by PyTorch."""
    xformers = pytest.importorskip("xformers.ops", reason="xFormers is not installed")
    monkeypatch.setattr(xformers, "memory_efficient_attention", bottom_right_masked)
    batch = random_batch(lengths, torch.float32, "cpu")
    attended = packed.attend_with_xformers(*batch, *lengths)
    expected = packed.attend_with_torch(*batch, *lengths)
    torch.testing.assert_close(attended, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="xFormers needs a GPU")
@prompts
def test_xformers_equals_torch(lengths):
    pytest.importorskip("xformers.ops", reason="xFormers is not installed")
    batch = random_batch(lengths, torch.bfloat16, "cuda")
    attended = packed.attend_with_xformers(*batch, *lengths)
    expected = packed.attend_with_torch(*batch, *lengths)
    torch.testing.assert_close(attended, expected, rtol=0, atol=2e-2)  # bfloat16


@pytest.mark.parametrize("error", [ImportError, NotImplementedError])
def test_where_xformers_does_not_run_torch_does(error, monkeypatch):
    def unavailable(*arguments):
        raise error("no kernel")

    def selected():
        shape = (NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.float32)
        with cpus_are_gpus():
            return packed.select_packed_attention(*shape, torch.device("cpu"))

    monkeypatch.setattr(packed, "attend_with_xformers", unavailable)
    assert selected() is packed.attend_with_torch

    monkeypatch.setattr(packed, "attend_with_xformers", lambda *arguments: None)
    assert selected() is packed.attend_with_xformers


@prompts
def test_torch_attends_on_a_gpu_as_on_a_cpu(lengths):
    """There a prompt that was read in part before is not cut into blocks."""
    batch = random_batch(lengths, torch.float32, "cpu")
    expected = packed.attend_with_torch(*batch, *lengths)
    with cpus_are_gpus():
        attended = packed.attend_with_torch(*batch, *lengths)
    torch.testing.assert_close(attended, expected, rtol=0, atol=TOLERANCE)


def test_on_a_cpu_xformers_is_not_even_imported(monkeypatch):
    def imported(*arguments):
        raise AssertionError("called")

    monkeypatch.setattr(packed, "attend_with_xformers", imported)
    chosen = packed.select_packed_attention(
        NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu")
    )
    assert chosen is packed.attend_with_torch
