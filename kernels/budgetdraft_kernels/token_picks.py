"""The next token and how sure the model is, in one pass over the vocabulary.

Each program sees a part of a row; a second, small kernel joins the parts.

A device divides with an error that differs from kernel to kernel: its compiler fuses a
division with what follows. Over a low temperature logits reach 1e8, where such an error
is worth more than any difference that counts. So the largest logit is subtracted first:
what is divided is 0 for the likeliest token, and small for all that may be drawn.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from budgetdraft_kernels import launch_settings
from budgetdraft_kernels.checks import check_logits


@triton.jit
def loaded_logits(logits, row, column, row_stride, vocab_size):
    """A tile of a row; -inf behind its end."""
    return tl.load(
        logits + row * row_stride + column,
        mask=column < vocab_size,
        other=float("-inf"),
    ).to(tl.float32)


@triton.jit
def relative(x, highest, temperature):
    """Logits less the highest, over the temperature; one of 0 counts as 1."""
    return (x - highest) / tl.where(temperature == 0.0, 1.0, temperature)


@triton.jit
def pick_part_kernel(
    part_stats,  # [2, B, parts]: the largest logit, and the sum relative to it
    part_tokens,  # [B, parts], the likeliest
    logits,
    temperatures,  # [B], or None: greedy
    row_stride,
    vocab_size,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    plane = tl.num_programs(0) * tl.num_programs(1)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    temperature = 0.0 if temperatures is None else tl.load(temperatures + row)
    x = loaded_logits(logits, row, column, row_stride, vocab_size)
    highest, winner = tl.max(x, 0, return_indices=True)
    # A part that is masked as a whole keeps weights of zero instead of NaN.
    x = relative(x, tl.where(highest == float("-inf"), 0.0, highest), temperature)
    tl.store(part_stats + part, highest)
    tl.store(part_stats + plane + part, tl.sum(tl.exp(x), 0))
    tl.store(part_tokens + part, tl.program_id(1) * TILE + winner)


@triton.jit
def first_beyond(weights, target):
    """The first of some weights up to which they sum to more than a number.

    Where rounding leaves none, the last one that weighs anything.
    """
    index = tl.arange(0, weights.shape[0])
    last = tl.max(tl.where(weights > 0.0, index, 0), 0)
    num_below = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    return tl.minimum(num_below, last)


# Where results go is aligned in one step of a draft, and not in the next.
@triton.jit(do_not_specialize_on_alignment=["tokens", "confidences"])
def pick_join_kernel(
    tokens,  # [B]
    confidences,  # [B]
    out_stride,
    largest,  # [B] float32, a row's largest logit; or None
    part_stats,
    part_tokens,
    logits,
    temperatures,
    uniforms,
    ids,  # [V], or None
    num_parts,
    row_stride,
    vocab_size,
    PARTS_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * num_parts
    index = tl.arange(0, PARTS_BLOCK)
    exists = index < num_parts
    part = row * num_parts + index
    lowest = float("-inf")
    part_max = tl.load(part_stats + part, mask=exists, other=lowest)
    part_sum = tl.load(part_stats + plane + part, mask=exists, other=0.0)
    part_token = tl.load(part_tokens + part, mask=exists, other=0)

    temperature = 0.0 if temperatures is None else tl.load(temperatures + row)
    highest = tl.max(part_max, 0)
    weights = part_sum * tl.exp(relative(part_max, highest, temperature))
    total = tl.sum(weights, 0)
    winner = index == tl.argmax(part_max, 0)
    token = tl.sum(tl.where(winner, part_token, 0), 0)
    if temperatures is not None and temperature > 0.0:
        target = tl.load(uniforms + row) * total
        drawn = first_beyond(weights, target)
        target -= tl.sum(tl.where(index < drawn, weights, 0.0), 0)
        column = drawn * TILE + tl.arange(0, TILE)
        x = loaded_logits(logits, row, column, row_stride, vocab_size)
        inner = tl.exp(relative(x, highest, temperature))
        token = drawn * TILE + first_beyond(inner, target)
    # A row of NaN has no winner, but still a token of the vocabulary.
    token = tl.minimum(token, vocab_size - 1).to(tl.int64)
    if ids is not None:
        token = tl.load(ids + token)
    tl.store(tokens + row * out_stride, token)
    # The largest logit itself weighs 1.
    tl.store(confidences + row * out_stride, 1.0 / total)
    if largest is not None:
        tl.store(largest + row, highest)


@triton.jit(do_not_specialize_on_alignment=["tokens", "confidences"])
def probabilities_kernel(
    probabilities,  # [B, V], or [B, W] with ids
    logits,
    temperatures,
    ids,  # [V], or None
    tokens,
    confidences,
    out_stride,
    largest,
    row_stride,
    probabilities_stride,
    vocab_size,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    temperature = tl.load(temperatures + row)
    x = loaded_logits(logits, row, column, row_stride, vocab_size)
    x = relative(x, tl.load(largest + row), temperature)
    token = column
    if ids is not None:
        token = tl.load(ids + column, mask=column < vocab_size, other=0)
    one_hot = (token == tl.load(tokens + row * out_stride)).to(tl.float32)
    softmax = tl.exp(x) * tl.load(confidences + row * out_stride)
    tl.store(
        probabilities + row * probabilities_stride + token,
        tl.where(temperature == 0.0, one_hot, softmax),
        mask=column < vocab_size,
    )


def greedy_pick(
    logits: Tensor,
    *,
    ids: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor]:
    """See ``reference.greedy_pick``."""
    if validate:
        check_logits(logits, ids=ids, out=out)
    tokens, confidences = out or _new_picks(logits)
    _pick(tokens, confidences, logits, None, None, ids)
    return tokens, confidences


def sampled_pick(
    logits: Tensor,
    temperatures: Tensor,
    uniforms: Tensor,
    *,
    ids: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor | None] | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``reference.sampled_pick``."""
    if validate:
        check_logits(logits, temperatures, uniforms, ids, out)
    if out is None:
        drawn_from = None
        if ids is None:
            drawn_from = torch.empty_like(logits, dtype=torch.float32)
        out = (*_new_picks(logits), drawn_from)
    tokens, confidences, drawn_from = out
    largest = _pick(tokens, confidences, logits, temperatures, uniforms, ids)
    batch, vocab_size = logits.shape
    tile = launch_settings.settings_of(logits.device).vocabulary_tile
    if batch and drawn_from is not None:
        probabilities_kernel[(batch, triton.cdiv(vocab_size, tile))](
            drawn_from,
            logits,
            temperatures,
            ids,
            tokens,
            confidences,
            tokens.stride(0),
            largest,
            logits.stride(0),
            drawn_from.stride(0),
            vocab_size,
            TILE=tile,
        )
    return tokens, confidences, drawn_from


def _new_picks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] and confidences [B], to be written."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    return tokens, torch.empty_like(tokens, dtype=torch.float32)


def _pick(
    tokens: Tensor,
    confidences: Tensor,
    logits: Tensor,
    temperatures: Tensor | None,
    uniforms: Tensor | None,
    ids: Tensor | None,
) -> Tensor | None:
    """Writes tokens and confidences; the largest logits [B], if tokens are drawn."""
    batch, vocab_size = logits.shape
    tile = launch_settings.settings_of(logits.device).vocabulary_tile
    parts = triton.cdiv(vocab_size, tile)
    new: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    stats = torch.empty(2, batch, parts, **new)
    part_tokens = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    largest = None if temperatures is None else torch.empty(batch, **new)
    if batch:
        pick_part_kernel[(batch, parts)](
            stats,
            part_tokens,
            logits,
            temperatures,
            logits.stride(0),
            vocab_size,
            TILE=tile,
        )
        pick_join_kernel[(batch,)](
            tokens,
            confidences,
            tokens.stride(0),
            largest,
            stats,
            part_tokens,
            logits,
            temperatures,
            uniforms,
            ids,
            parts,
            logits.stride(0),
            vocab_size,
            PARTS_BLOCK=triton.next_power_of_2(parts),
            TILE=tile,
        )
    return largest
