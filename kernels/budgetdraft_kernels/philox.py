"""Counter-based random numbers, the same ones as ``triton.language.rand``."""

import torch
from torch import Tensor


def philox_uniform(seeds: Tensor, count: int) -> Tensor:
    """[B, count] float32 in [0, 1): Philox-4x32-10 of (seed, column), first word."""
    mask = 0xFFFFFFFF
    multipliers, weyl = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)

    def product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """High and low words of a product of two words, within int64."""
        low, high = (a & 0xFFFF) * b, (a >> 16) * b
        total = (low >> 16) + high  # below 2 ** 49
        return total >> 16, ((total << 16) | (low & 0xFFFF)) & mask

    column = torch.arange(count, device=seeds.device).expand(len(seeds), -1)
    words = [column, *[torch.zeros_like(column)] * 3]
    keys = [seeds[:, None] & mask, (seeds[:, None] >> 32) & mask]
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = (
            product(words[i], m) for i, m in zip((0, 2), multipliers, strict=True)
        )
        words = [high_b ^ words[1] ^ keys[0], low_b, high_a ^ words[3] ^ keys[1], low_a]
        keys = [(key + w) & mask for key, w in zip(keys, weyl, strict=True)]
    signed = words[0].to(torch.int32)
    # As triton.language.rand: the scale is the largest that stays below one.
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
