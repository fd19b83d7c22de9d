"""Lossless speculative decoding for vLLM with a drafter on a fixed KV budget.

Importing this package imports none of torch, vllm, transformers or triton: vLLM loads
every plugin in every one of its processes.
"""

__version__ = "0.1.0"
