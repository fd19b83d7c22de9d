"""The target's own paged cache, as our operations take pages."""

from typing import Any

from torch import Tensor

from vllm_budgetdraft.attention.backend import is_gpu
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.flexdraft.proposer import MaskProposer

#: Instruction sets whose blocks on a CPU hold plain numbers: keys by dimension, values
#: by token. Others interleave them for their matrix instructions.
PLAIN_CPU_BLOCKS = ("vec", "vec16")


def bind_to_target(core: MaskProposer, num_kinds: int) -> None:
    """Tells mask tokens where the target's cache is, once the engine has it.

    Args:
        num_kinds: of caches that the engine has for the target.

    Raises:
        UnsupportedVllmError: there are several kinds; see also ``pages_of``.
    """
    if num_kinds != 1:
        raise UnsupportedVllmError(
            f"the target has {num_kinds} kinds of cache; flexdraft drafts for targets "
            "with full attention in every layer"
        )
    layers = core.loop.parts.layers
    core.bind([pages_of(layer.self_attn.attn) for layer in layers])


def pages_of(attention: Any) -> tuple[Tensor, Tensor]:
    """Key and value pages of one of vLLM's attention layers, [num_pages, P, G, D].

    They are views, valid as long as the engine's cache.

    Raises:
        UnsupportedVllmError: the cache is laid out in a way that is not known here.
    """
    cache = attention.kv_cache
    if isinstance(cache, list):  # one for each stage of a pipeline, in older versions
        cache = cache[0]
    head_size = attention.head_size
    isa = getattr(attention, "isa", None)
    if attention.kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise UnsupportedVllmError(
            f"kv_cache_dtype={attention.kv_cache_dtype!r}: flexdraft reads caches of "
            "the target's own type; use kv_cache_dtype='auto'"
        )
    if isa in PLAIN_CPU_BLOCKS and cache.ndim == 4:
        # [num_pages, G, P, 2 * D], the keys of a head before its values.
        num_pages, num_kv_heads, page_size, _ = cache.shape
        halves = cache.view(num_pages, num_kv_heads, 2, page_size * head_size)
        keys = halves[:, :, 0].unflatten(-1, (head_size, page_size))
        values = halves[:, :, 1].unflatten(-1, (page_size, head_size))
        return keys.permute(0, 3, 1, 2), values.permute(0, 2, 1, 3)
    if isa is None and is_gpu(cache.device):
        if cache.ndim == 4 and cache.shape[-1] == 2 * head_size:
            keys, values = cache.transpose(1, 2).split(head_size, -1)
            return keys, values
        if cache.ndim == 5 and cache.shape[-1] == head_size:
            if cache.shape[1] == 2:
                return cache[:, 0], cache[:, 1]
            if cache.shape[0] == 2:
                return cache[0], cache[1]
    raise UnsupportedVllmError(
        f"the target's cache is {tuple(cache.shape)} {cache.dtype} on "
        f"{cache.device.type} (instruction set {isa}), a layout that flexdraft does "
        "not read; on a CPU use dtype='float32', on a GPU attention_backend=TRITON_ATTN"
    )
