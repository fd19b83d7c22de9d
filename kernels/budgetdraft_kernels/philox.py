"""Counter-based random numbers, the same ones as ``triton.language.rand``."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox_uniform(seeds: Tensor, count: int) -> Tensor:
    """[B, count] float32 in [0, 1): Philox-4x32-10 of (seed, column), first word."""
    a = torch.arange(count, device=seeds.device).expand(len(seeds), -1)
    b = c = d = torch.zeros_like(a)
    keys = seeds[:, None], seeds[:, None] >> 32
    for _ in range(10):
        # Products of two words wrap around as int64; their lower 64 bits are right.
        # Of b, d and the keys only the lower 32 bits matter.
        product_a, product_c = a * 0xD2511F53, c * 0xCD9E8D57
        a = ((product_c >> 32) ^ b ^ keys[0]) & MASK
        c = ((product_a >> 32) ^ d ^ keys[1]) & MASK
        b, d = product_c, product_a
        keys = keys[0] + 0x9E3779B9, keys[1] + 0xBB67AE85
    signed = a.to(torch.int32)
    # As triton.language.rand does: a negative n becomes -1 - n, which is n with all its
    # bits turned, and the scale is the largest that stays below one.
    return (signed ^ (signed >> 31)).float() * 4.6566127342e-10
