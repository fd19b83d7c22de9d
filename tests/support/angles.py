"""Angles of rotary embeddings."""

import torch
from torch import Tensor


def half_angles(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angles of one half, and cos and sin as ``rotate`` takes them."""
    half = 6 * torch.randn(*shape, dtype=torch.float64)
    return (
        half,
        torch.cat([half.cos(), half.cos()], -1),
        torch.cat([-half.sin(), half.sin()], -1),
    )
