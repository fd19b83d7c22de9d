"""Attention and cache operations of the draft path.

``reference`` holds each one in plain PyTorch: the definition that a faster version is
held to, and what runs where Triton has no device.
"""
