"""What the operations refuse, with the value and the limit in the message."""

from collections.abc import Mapping

import torch
from torch import Tensor

from budgetdraft_kernels.index_checks import check_cells, check_page_table, check_range

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
FP8 = torch.float8_e4m3fn

Shape = tuple[int | str, ...]


def check_attention(
    queries: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    max_query_tokens: int,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    key_rotary: tuple[Tensor, Tensor] | None,
    page_attention: Tensor | None,
    lse: Tensor | None,
    causal: bool,
) -> None:
    """Arguments of ``paged_sparse_attention``."""
    cos, sin = key_rotary or (None, None)
    by_head = page_table.ndim == 3
    tensors = {
        "queries": (queries, ("T", "H", "D")),
        "key_pages": (key_pages, ("num_pages", "P", "G", "D")),
        "value_pages": (value_pages, ("num_pages", "P", "G", "D")),
        "lengths": (lengths, ("B",)),
        "page_table": (page_table, ("B", "G", "N") if by_head else ("B", "N")),
        "query_starts": (query_starts, ("num_starts",)),
        "key_scale": (key_scale, ("G",)),
        "value_scale": (value_scale, ("G",)),
        "page_attention": (page_attention, ("T", "H", "N")),
        "lse": (lse, ("T", "H")),
        "cos": (cos, ("num_angles", "D")),
        "sin": (sin, ("num_angles", "D")),
    }
    _check_tensors(tensors)
    if len(query_starts) != len(lengths) + 1:
        raise ValueError(
            f"query_starts has {len(query_starts)} entries; {len(lengths)} requests "
            f"need {len(lengths) + 1}"
        )
    _check_groups(queries, key_pages.shape[2])
    held, page_size = page_table.shape[-1], key_pages.shape[1]
    if min(held, page_size) < 1:
        raise ValueError(
            f"requests have room for {held} pages of {page_size} tokens; give them one"
        )
    if cos is not None:
        _check_rotary(queries, cos)
        if cos.shape[0] < held * page_size:
            raise ValueError(
                f"key_rotary has {cos.shape[0]} angles; it needs {held * page_size}, "
                f"one for each token of {held} pages of {page_size}"
            )
    _check_types(FLOATS, queries=queries, cos=cos, sin=sin)
    _check_types((queries.dtype, FP8), key_pages=key_pages, value_pages=value_pages)
    _check_types(
        (torch.float32,),
        key_scale=key_scale,
        value_scale=value_scale,
        page_attention=page_attention,
        lse=lse,
    )
    _check_types(
        INTEGERS, page_table=page_table, lengths=lengths, query_starts=query_starts
    )
    _check_last_contiguous(
        queries=queries, key_pages=key_pages, page_table=page_table, cos=cos
    )
    _check_contiguous(
        lengths=lengths,
        query_starts=query_starts,
        key_scale=key_scale,
        value_scale=value_scale,
        page_attention=page_attention,
        lse=lse,
    )
    _check_same_strides(key_pages=key_pages, value_pages=value_pages)
    _check_same_strides(cos=cos, sin=sin)
    check_page_table(
        page_table,
        lengths,
        query_starts,
        len(queries),
        key_pages,
        max_query_tokens,
        causal,
    )


def check_cache_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    cells: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    """Arguments of ``paged_cache_write``."""
    query_norm, key_norm, _ = norms or (None, None, 0.0)
    tensors = {
        "qkv": (qkv, ("T", "heads", "D")),
        "cos": (cos, ("T", "D")),
        "sin": (sin, ("T", "D")),
        "key_pages": (key_pages, ("num_pages", "P", "G", "D")),
        "value_pages": (value_pages, ("num_pages", "P", "G", "D")),
        "cells": (cells, ("T",)),
        "query_norm": (query_norm, ("D",)),
        "key_norm": (key_norm, ("D",)),
        "key_scale": (key_scale, ("G",)),
        "value_scale": (value_scale, ("G",)),
    }
    _check_tensors(tensors)
    _check_rotary(qkv, cos)
    if qkv.shape[1] <= 2 * key_pages.shape[2]:
        raise ValueError(
            f"qkv has {qkv.shape[1]} heads; it needs one query head and a key and "
            f"a value head for each of {key_pages.shape[2]} KV heads"
        )
    _check_types(FLOATS, qkv=qkv, cos=cos, sin=sin)
    _check_types((qkv.dtype, FP8), key_pages=key_pages, value_pages=value_pages)
    _check_types((qkv.dtype,), query_norm=query_norm, key_norm=key_norm)
    _check_types((torch.float32,), key_scale=key_scale, value_scale=value_scale)
    _check_types((torch.int64,), cells=cells)
    _check_last_contiguous(qkv=qkv, cos=cos)
    _check_same_strides(cos=cos, sin=sin)
    _check_contiguous(
        key_pages=key_pages,
        value_pages=value_pages,
        cells=cells,
        query_norm=query_norm,
        key_norm=key_norm,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    check_cells(cells, key_pages)


def check_compaction(
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    cells: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    """Arguments of ``page_compaction``."""
    tensors = {
        "keys": (keys, ("L", "num_tokens", "G", "D")),
        "values": (values, ("L", "num_tokens", "G", "D")),
        "kept": (kept, ("L", "G", "num_kept")),
        "key_pages": (key_pages, ("L", "num_pages", "P", "G", "D")),
        "value_pages": (value_pages, ("L", "num_pages", "P", "G", "D")),
        "cells": (cells, ("num_kept",)),
        "key_scale": (key_scale, ("L", "G")),
        "value_scale": (value_scale, ("L", "G")),
    }
    _check_tensors(tensors)
    _check_types(FLOATS, keys=keys, values=values)
    _check_types((keys.dtype, FP8), key_pages=key_pages, value_pages=value_pages)
    _check_types((torch.float32,), key_scale=key_scale, value_scale=value_scale)
    _check_types((torch.int64,), kept=kept, cells=cells)
    _check_last_contiguous(keys=keys)
    _check_same_strides(keys=keys, values=values)
    _check_contiguous(
        key_pages=key_pages,
        value_pages=value_pages,
        kept=kept,
        cells=cells,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    check_range("kept", kept, keys.shape[1], f"a prompt of {keys.shape[1]} tokens")
    check_cells(cells, key_pages[0])


def check_chunk_scores(
    keys: Tensor, queries: Tensor, chunk_size: int, score: str
) -> None:
    """Arguments of ``chunk_scores``."""
    tensors = {
        "keys": (keys, ("L", "G", "num_tokens", "D")),
        "queries": (queries, ("L", "G", "heads", "num_queries", "D")),
    }
    _check_tensors(tensors)
    _check_types((*FLOATS, torch.float64), keys=keys, queries=queries)
    _check_types((keys.dtype,), queries=queries)
    _check_last_contiguous(keys=keys, queries=queries)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; it must be 1 or more")
    if queries.shape[3] > keys.shape[2]:
        raise ValueError(
            f"queries are of {queries.shape[3]} tokens and keys only of "
            f"{keys.shape[2]}; a query's token has a key too"
        )
    if score not in ("mean_key", "attention"):
        raise ValueError(f"score={score!r}; it is 'mean_key' or 'attention'")


def check_accumulated_attention(queries: Tensor, keys: Tensor) -> None:
    """Arguments of ``accumulated_attention``."""
    _check_tensors(
        {"queries": (queries, ("T", "H", "D")), "keys": (keys, ("S", "G", "D"))}
    )
    _check_groups(queries, keys.shape[1])
    if len(queries) > len(keys):
        raise ValueError(
            f"queries have {len(queries)} tokens and keys only {len(keys)}; a query "
            "token has a key too"
        )
    _check_types(FLOATS, queries=queries)
    _check_types((queries.dtype,), keys=keys)
    _check_last_contiguous(queries=queries, keys=keys)


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    gated: bool,
    residual: Tensor | None,
) -> None:
    """Arguments of ``linear``."""
    rows, outputs = len(weight), len(weight) // 2 if gated else len(weight)
    if gated and rows % 2:
        raise ValueError(f"weight has {rows} rows; gate and up need as many each")
    tensors: dict[str, tuple[Tensor | None, Shape]] = {
        "x": (x, ("T", "K")),
        "weight": (weight, ("rows", "K")),
        "bias": (bias, (rows,)),
        "norm": (norm, ("K",)),
        "residual": (residual, ("T", outputs)),
    }
    _check_tensors(tensors)
    _check_types(FLOATS, x=x)
    others = {"weight": weight, "bias": bias, "norm": norm, "residual": residual}
    _check_types((x.dtype,), **others)
    _check_contiguous(x=x, **others)


def check_logits(
    logits: Tensor,
    temperatures: Tensor | None = None,
    uniforms: Tensor | None = None,
    ids: Tensor | None = None,
    out: tuple[Tensor | None, ...] | None = None,
) -> None:
    """Arguments of ``greedy_pick`` and ``sampled_pick``."""
    tokens, confidences, probabilities = (*(out or ()), None, None, None)[:3]
    tensors = {
        "logits": (logits, ("B", "V")),
        "temperatures": (temperatures, ("B",)),
        "uniforms": (uniforms, ("B",)),
        "ids": (ids, ("V",)),
        "tokens": (tokens, ("B",)),
        "confidences": (confidences, ("B",)),
        "probabilities": (probabilities, ("B", "V" if ids is None else "W")),
    }
    _check_tensors(tensors)
    _check_types(FLOATS, logits=logits)
    _check_types((torch.float32,), temperatures=temperatures, uniforms=uniforms)
    _check_types((torch.float32,), confidences=confidences, probabilities=probabilities)
    _check_types((torch.int64,), tokens=tokens, ids=ids)
    _check_last_contiguous(logits=logits, probabilities=probabilities)
    _check_same_strides(tokens=tokens, confidences=confidences)
    _check_contiguous(temperatures=temperatures, uniforms=uniforms, ids=ids)
    if not logits.shape[1]:
        raise ValueError("logits has no vocabulary, V=0")
    if ids is not None:
        wrong = ids < 0
        limit = "no token is negative"
        if probabilities is not None:
            wrong |= ids >= probabilities.shape[1]
            limit = f"probabilities has {probabilities.shape[1]} columns"
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise ValueError(f"ids[{place}] is {int(ids[place])}; {limit}")
    if temperatures is not None:
        wrong = ~((temperatures >= 0) & temperatures.isfinite())
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"temperatures[{row}] is {float(temperatures[row])}; it must be finite "
                "and not below 0"
            )
    if uniforms is not None:
        wrong = ~((uniforms >= 0) & (uniforms < 1))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"uniforms[{row}] is {float(uniforms[row])}; it must be at least 0 and "
                "below 1"
            )


def _check_tensors(tensors: Mapping[str, tuple[Tensor | None, Shape]]) -> None:
    """Sizes against each other, and that all are on one device.

    A letter in a shape stands for one number wherever it appears.
    """
    sizes: dict[int | str, int] = {}
    devices = {}
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        devices[name] = tensor.device
        found = tuple(tensor.shape)
        if len(found) == len(shape):
            for size, number in zip(shape, found, strict=True):
                if isinstance(size, str):
                    sizes.setdefault(size, number)
        wanted = tuple(sizes[size] if size in sizes else size for size in shape)
        if found != wanted:
            named = ", ".join(
                f"{size}={sizes[size]}" if size in sizes else str(size)
                for size in shape
            )
            raise ValueError(f"{name} has shape {list(found)}, not [{named}]")
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors are on several devices, move them to one: {devices}")


def _check_types(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            names = " or ".join(map(str, dict.fromkeys(allowed)))
            raise TypeError(f"{name} is {tensor.dtype}, not {names}; convert it first")


def _check_last_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}, its last dimension is not "
                "contiguous; call .contiguous() on it"
            )


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} of shape {list(tensor.shape)} has strides {tensor.stride()}, "
                "it is not contiguous; call .contiguous() on it"
            )


def _check_same_strides(**pair: Tensor | None) -> None:
    strides = {name: x.stride() for name, x in pair.items() if x is not None}
    if len(set(strides.values())) > 1:
        raise ValueError(f"strides differ, lay the two out alike: {strides}")


def _check_groups(queries: Tensor, num_kv_heads: int) -> None:
    num_heads = queries.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"queries have {num_heads} heads, not a multiple of the {num_kv_heads} KV "
            "heads"
        )


def _check_rotary(x: Tensor, cos: Tensor) -> None:
    if x.shape[-1] % 2:
        raise ValueError(f"D={x.shape[-1]} is odd; rotary embedding turns pairs")
