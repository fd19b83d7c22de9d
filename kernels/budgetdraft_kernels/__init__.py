"""Attention and cache operations of the draft path.

``reference`` holds each one in plain PyTorch: the definition that a kernel is held to,
and what runs where Triton has no device. ``fused`` holds them, under the same names and
with the same signatures, as Triton kernels.
"""
