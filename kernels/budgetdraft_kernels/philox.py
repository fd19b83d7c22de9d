"""Counter-based random numbers, the same ones as ``triton.language.rand``."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox_uniform(seeds: Tensor, count: int) -> Tensor:
    """[B, count] float32 in [0, 1): Philox-4x32-10 of (seed, column), first word."""
    uniform = seeds.new_empty((len(seeds), count), dtype=torch.float32)
    for row, seed in zip(uniform, seeds, strict=True):  # which stay in a CPU's cache
        row.copy_(_of_one_seed(seed, count))
    return uniform


def _of_one_seed(seed: Tensor, count: int) -> Tensor:
    a = torch.arange(count, device=seed.device)
    b = c = d = torch.zeros_like(a)
    keys = seed, seed >> 32
    for _ in range(10):
        # Their lower 64 bits are right, whatever the sign; of b and d, and of keys,
        # only the lower 32 matter.
        product_a, product_c = a * 0xD2511F53, c * 0xCD9E8D57
        a = ((product_c >> 32) ^ b ^ keys[0]) & MASK
        c = ((product_a >> 32) ^ d ^ keys[1]) & MASK
        b, d = product_c, product_a
        keys = keys[0] + 0x9E3779B9, keys[1] + 0xBB67AE85
    signed = a.to(torch.int32)
    # As triton.language.rand, by -1 - n for negative n: n with all its bits turned.
    # The scale is the largest that stays below one.
    return (signed ^ (signed >> 31)).float() * 4.6566127342e-10
