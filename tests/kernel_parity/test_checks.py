"""Wrong arguments are refused alike, with the value and the limit in the message."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from budgetdraft_kernels import fused, reference

Arguments = dict[str, Any]
FP8 = torch.float8_e4m3fn


def attention() -> Arguments:
    """2 requests with 3 query tokens, 4 heads of 2 KV heads, 5 pages of 8."""
    pages = torch.zeros(5, 8, 2, 32)
    return {
        "queries": torch.zeros(3, 4, 32),
        "key_pages": pages,
        "value_pages": pages.clone(),
        "page_table": torch.tensor([[0, 1, 2], [4, 3, -1]]),
        "lengths": torch.tensor([24, 16]),
        "query_starts": torch.tensor([0, 2, 3]),
        "max_query_tokens": 2,
        "key_scale": torch.ones(2),
        "value_scale": torch.ones(2),
        "key_rotary": (torch.zeros(24, 32), torch.zeros(24, 32)),
        "page_attention": torch.zeros(3, 4, 3),
    }


def cache_write() -> Arguments:
    """3 tokens of 2 query and 2 KV heads, 5 pages of 8."""
    pages = torch.zeros(5, 8, 2, 32)
    return {
        "qkv": torch.zeros(3, 6, 32),
        "cos": torch.zeros(3, 32),
        "sin": torch.zeros(3, 32),
        "key_pages": pages,
        "value_pages": pages.clone(),
        "cells": torch.tensor([0, 39, 7]),
        "norms": (torch.ones(32), torch.ones(32), 1e-6),
        "key_scale": torch.ones(2),
        "value_scale": torch.ones(2),
    }


def compaction() -> Arguments:
    """2 layers of a prompt of 9 tokens, of which 3 are kept, in 5 pages of 8."""
    pages = torch.zeros(2, 5, 8, 2, 32)
    return {
        "keys": torch.zeros(2, 9, 2, 32),
        "values": torch.zeros(2, 9, 2, 32),
        "kept": torch.tensor([0, 4, 8]).repeat(2, 2, 1),
        "key_pages": pages,
        "value_pages": pages.clone(),
        "cells": torch.tensor([0, 39, 7]),
        "key_scale": torch.ones(2, 2),
        "value_scale": torch.ones(2, 2),
    }


def chunk_scores() -> Arguments:
    return {
        "keys": torch.zeros(2, 3, 9, 32),
        "queries": torch.zeros(2, 3, 2, 4, 32),
        "chunk_size": 4,
        "score": "attention",
    }


def sampled() -> Arguments:
    return {
        "logits": torch.zeros(3, 50),
        "temperatures": torch.tensor([0.0, 0.5, 1.0]),
        "uniforms": torch.tensor([0.0, 0.5, 0.9]),
    }


VALID: dict[str, Callable[[], Arguments]] = {
    "paged_sparse_attention": attention,
    "paged_cache_write": cache_write,
    "page_compaction": compaction,
    "chunk_scores": chunk_scores,
    "greedy_pick": lambda: {"logits": torch.zeros(3, 50)},
    "sampled_pick": sampled,
}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Not contiguous in its last dimension."""
    return torch.zeros(*shape, 2, dtype=dtype)[..., 0]


def wide(*shape: int) -> torch.Tensor:
    """Contiguous in its last dimension alone."""
    return torch.zeros(*shape[:-1], shape[-1] + 1)[..., :-1]


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


HALF, DOUBLE = torch.float16, torch.float64
#: In the operations' own files, for want of room here.
CHECKED_ELSEWHERE = {"accumulated_attention", "linear"}
ROTARY = (zeros(24, 32), zeros(24, 32))
TABLE = [[0, 1, 2], [4, 3, -1]]

#: By operation: what is wrong, and what the message has to name.
WRONG_VALUES: dict[str, list[tuple[Arguments, str]]] = {
    "paged_sparse_attention": [
        ({"queries": zeros(3, 4)}, r"queries has shape \[3, 4\], not \[T, H, D\]"),
        (
            {"queries": zeros(3, 5, 32), "page_attention": None},
            r"queries have 5 heads.* the 2 KV heads",
        ),
        ({"queries": zeros(3, 4, 16)}, r"key_pages has shape .*32\], .*D=16"),
        ({"value_pages": zeros(5, 8, 2, 16)}, r"value_pages .*16\], .*D=32"),
        ({"value_pages": zeros(6, 8, 2, 32)}, r"value_pages .*\[6, .*num_pages=5"),
        ({"page_table": ids(0, 1, 2)}, r"page_table has shape \[3\], not \[B=2, N\]"),
        ({"page_table": zeros(3, 3).long()}, r"page_table .*\[3, 3\], .*B=2"),
        ({"page_table": zeros(2, 3, 3).long()}, r"page_table .*\[2, 3, 3\], .*G=2"),
        (
            {"page_table": zeros(2, 0).long(), "page_attention": None},
            r"room for 0 pages",
        ),
        ({"lengths": ids(24)}, r"\[2, 3\], not \[B=1, N=3\]"),
        ({"lengths": torch.tensor(24)}, r"lengths has shape \[\], not \[B\]"),
        ({"query_starts": ids(0, 3)}, r"query_starts has 2 entries; 2 requests need 3"),
        ({"key_scale": torch.ones(3)}, r"key_scale has shape \[3\], not \[G=2\]"),
        ({"value_scale": torch.ones(2, 1)}, r"value_scale .*\[2, 1\], not \[G=2\]"),
        ({"page_attention": zeros(3, 4, 4)}, r"page_attention .*\[3, 4, 4\], .*N=3"),
        ({"page_attention": zeros(2, 4, 3)}, r"page_attention .*\[2, 4, 3\], .*T=3"),
        ({"key_rotary": (ROTARY[0], zeros(25, 32))}, r"sin .*\[25, .*num_angles=24"),
        ({"key_rotary": (zeros(24, 30),) * 2}, r"cos .*\[24, 30\], .*D=32"),
        (
            {"key_rotary": (zeros(23, 32),) * 2},
            r"key_rotary has 23 angles; it needs 24.* 3 pages of 8",
        ),
        (
            {
                "queries": zeros(3, 4, 5),
                "key_pages": zeros(5, 8, 2, 5),
                "value_pages": zeros(5, 8, 2, 5),
                "key_rotary": (zeros(24, 5),) * 2,
            },
            r"D=5 is odd",
        ),
        ({"queries": strided(3, 4, 32)}, r"queries has strides \(256, 64, 2\)"),
        (
            {"key_pages": strided(5, 8, 2, 32), "value_pages": strided(5, 8, 2, 32)},
            r"key_pages has strides \(1024, 128, 64, 2\)",
        ),
        ({"value_pages": wide(5, 8, 2, 32)}, r"strides differ.*512.*528"),
        ({"key_rotary": (ROTARY[0], wide(24, 32))}, r"strides differ.*32.*33"),
        ({"key_rotary": (strided(24, 32),) * 2}, r"cos has strides \(64, 2\)"),
        (
            {"page_table": strided(2, 3, dtype=torch.int64)},
            r"page_table has strides \(6, 2\)",
        ),
        ({"lengths": strided(2, dtype=torch.int64)}, r"lengths .*\(2,\)"),
        ({"query_starts": strided(3, dtype=torch.int64)}, r"query_starts .*\(2,\)"),
        ({"key_scale": strided(2)}, r"key_scale of shape \[2\] has strides \(2,\)"),
        ({"page_attention": wide(3, 4, 3)}, r"page_attention .*\(16, 4, 1\)"),
        ({"lengths": ids(24, 25)}, r"lengths\[1\] is 25, .*0 to 24: 3 pages of 8"),
        ({"lengths": ids(-1, 16)}, r"lengths\[0\] is -1, not from 0"),
        ({"lengths": ids(1, 16)}, r"request 0 has 2 query tokens and length 1"),
        ({"max_query_tokens": 1}, r"request \[0\] is 2, .*max_query_tokens=1"),
        ({"query_starts": ids(0, 2, 1)}, r"request \[1\] is -1, not from 0 to 2"),
        ({"query_starts": ids(0, 1, 2)}, r"go from 0 to 2, not from 0 to the 3"),
        ({"query_starts": ids(1, 2, 3)}, r"go from 1 to 3, not from 0 to the 3"),
        (
            {"page_table": torch.tensor([[0, 1, 5], TABLE[1]])},
            r"page_table\[0, 2\] is 5, not from 0 to 4: a pool of 5 pages",
        ),
        (
            {"page_table": torch.tensor([TABLE[0], [4, -2, 0]])},
            r"page_table\[1, 1\] is -2, not from 0 to 4",
        ),
        (
            {"page_table": torch.tensor([[TABLE[0]] * 2, [TABLE[1], [4, 5, 0]]])},
            r"page_table\[1, 1, 1\] is 5, not from 0 to 4",
        ),
        ({"page_attention": zeros(3, 4, 3).to("meta")}, r"several devices.*meta"),
    ],
    "paged_cache_write": [
        ({"qkv": zeros(3, 6 * 32)}, r"qkv has shape \[3, 192\]"),
        ({"qkv": zeros(3, 4, 32)}, r"qkv has 4 heads; .*2 KV heads"),
        ({"qkv": zeros(4, 6, 32)}, r"cos has shape \[3, 32\], not \[T=4, D=32\]"),
        ({"sin": zeros(3, 16)}, r"sin has shape \[3, 16\], .*D=32"),
        ({"key_pages": zeros(5, 8, 2, 16)}, r"key_pages .*16\], .*D=32"),
        ({"value_pages": zeros(5, 9, 2, 32)}, r"value_pages .*9, .*P=8"),
        ({"cells": ids(0, 1)}, r"cells has shape \[2\], not \[T=3\]"),
        ({"norms": (zeros(32), zeros(16), 0.0)}, r"key_norm .*\[16\], not \[D=32\]"),
        ({"key_scale": torch.ones(3)}, r"key_scale has shape \[3\], not \[G=2\]"),
        ({"value_scale": torch.ones(1)}, r"value_scale has shape \[1\], not \[G=2\]"),
        (
            {
                "qkv": zeros(3, 6, 5),
                "cos": zeros(3, 5),
                "sin": zeros(3, 5),
                "key_pages": zeros(5, 8, 2, 5),
                "value_pages": zeros(5, 8, 2, 5),
                "norms": None,
            },
            r"D=5 is odd",
        ),
        ({"qkv": strided(3, 6, 32)}, r"qkv has strides \(384, 64, 2\)"),
        ({"cos": strided(3, 32)}, r"cos has strides \(64, 2\)"),
        ({"sin": wide(3, 32)}, r"strides differ.*\(32, 1\).*\(33, 1\)"),
        ({"key_pages": wide(5, 8, 2, 32)}, r"key_pages .*\(528, 66, 33, 1\)"),
        (
            {"value_pages": zeros(5, 2, 8, 32).transpose(1, 2)},
            r"value_pages .*\(512, 32, 256, 1\)",
        ),
        ({"cells": strided(3, dtype=torch.int64)}, r"cells .*\(2,\)"),
        ({"norms": (strided(32), zeros(32), 0.0)}, r"query_norm .*\(2,\)"),
        ({"key_scale": strided(2)}, r"key_scale .*\(2,\)"),
        ({"cells": ids(0, 40, 7)}, r"cells\[1\] is 40, .*0 to 39: 5 pages of 8 cells"),
        ({"cells": ids(0, 1, -1)}, r"cells\[2\] is -1, not from 0 to 39"),
        ({"cells": ids(0, 1, 2).to("meta")}, r"several devices.*meta"),
    ],
    "page_compaction": [
        ({"keys": zeros(2, 9, 2, 16)}, r"values has shape .*32\], .*D=16"),
        ({"values": zeros(2, 8, 2, 32)}, r"values .*8, .*num_tokens=9"),
        ({"kept": zeros(2, 3, 3).long()}, r"kept has shape \[2, 3, 3\], .*G=2"),
        ({"key_pages": zeros(3, 5, 8, 2, 32)}, r"key_pages .*\[3, .*L=2"),
        ({"value_pages": zeros(2, 6, 8, 2, 32)}, r"value_pages .*6, .*num_pages=5"),
        ({"cells": ids(0, 1)}, r"cells has shape \[2\], not \[num_kept=3\]"),
        ({"key_scale": torch.ones(2)}, r"key_scale has shape \[2\], not \[L=2, G=2\]"),
        ({"value_scale": torch.ones(2, 3)}, r"value_scale .*\[2, 3\], .*G=2"),
        ({"keys": strided(2, 9, 2, 32)}, r"keys has strides \(1152, 128, 64, 2\)"),
        ({"values": wide(2, 9, 2, 32)}, r"strides differ.*576.*594"),
        ({"kept": strided(2, 2, 3, dtype=torch.int64)}, r"kept .*\(12, 6, 2\)"),
        ({"key_pages": wide(2, 5, 8, 2, 32)}, r"key_pages .*\(2640, 528, 66, 33, 1\)"),
        ({"value_pages": wide(2, 5, 8, 2, 32)}, r"value_pages .*\(2640, .*33, 1\)"),
        ({"cells": strided(3, dtype=torch.int64)}, r"cells .*\(2,\)"),
        ({"value_scale": strided(2, 2)}, r"value_scale .*\(4, 2\)"),
        (
            {"kept": ids(0, 4, 9).repeat(2, 2, 1)},
            r"kept\[0, 0, 2\] is 9, not from 0 to 8: a prompt of 9 tokens",
        ),
        ({"kept": ids(0, -3, 8).repeat(2, 2, 1)}, r"kept\[0, 0, 1\] is -3"),
        ({"cells": ids(0, 40, 7)}, r"cells\[1\] is 40, .*0 to 39: 5 pages of 8 cells"),
        ({"cells": ids(-1, 0, 7)}, r"cells\[0\] is -1, not from 0 to 39"),
        ({"values": zeros(2, 9, 2, 32).to("meta")}, r"several devices.*meta"),
    ],
    "chunk_scores": [
        ({"keys": zeros(2, 9, 32)}, r"keys has shape \[2, 9, 32\], not \[L, G,"),
        ({"queries": zeros(2, 2, 2, 4, 32)}, r"queries .*\[2, 2, 2, 4, 32\], .*G=3"),
        ({"queries": zeros(2, 3, 2, 4, 16)}, r"queries .*16\], .*D=32"),
        ({"queries": zeros(2, 3, 2, 10, 32)}, r"queries are of 10 tokens .* only of 9"),
        ({"keys": strided(2, 3, 9, 32)}, r"keys has strides \(1728, 576, 64, 2\)"),
        ({"queries": strided(2, 3, 2, 4, 32)}, r"queries has strides \(1536, .*, 2\)"),
        ({"chunk_size": 0}, r"chunk_size=0; it must be 1 or more"),
        ({"chunk_size": -8}, r"chunk_size=-8; it must be 1 or more"),
        ({"score": "median"}, r"score='median'; it is 'mean_key' or 'attention'"),
        ({"queries": zeros(2, 3, 2, 4, 32).to("meta")}, r"several devices.*meta"),
    ],
    "greedy_pick": [
        ({"logits": zeros(50)}, r"logits has shape \[50\], not \[B, V\]"),
        ({"logits": strided(3, 50)}, r"logits has strides \(100, 2\)"),
        ({"logits": zeros(3, 0)}, r"logits has no vocabulary, V=0"),
        ({"ids": ids(1, 2)}, r"ids has shape \[2\], not \[V=50\]"),
        ({"ids": strided(50, dtype=torch.int64)}, r"ids .*\(2,\)"),
        ({"ids": torch.arange(-1, 49)}, r"ids\[0\] is -1; no token is negative"),
    ],
    "sampled_pick": [
        ({"logits": zeros(3, 50, 1)}, r"logits has shape \[3, 50, 1\]"),
        ({"logits": strided(3, 50)}, r"logits has strides \(100, 2\)"),
        ({"temperatures": torch.ones(2)}, r"temperatures .*\[2\], not \[B=3\]"),
        ({"uniforms": torch.zeros(2)}, r"uniforms has shape \[2\], not \[B=3\]"),
        ({"temperatures": strided(3)}, r"temperatures .*\(2,\)"),
        ({"uniforms": strided(3)}, r"uniforms .*\(2,\)"),
        (
            {"temperatures": torch.tensor([1.0, -0.5, 0.0])},
            r"temperatures\[1\] is -0\.5; it must be finite and not below 0",
        ),
        (
            {"temperatures": torch.tensor([1, torch.nan, 0])},
            r"temperatures\[1\] is nan",
        ),
        (
            {"temperatures": torch.tensor([torch.inf, 0, 0])},
            r"temperatures\[0\] is inf",
        ),
        ({"uniforms": torch.zeros(3).to("meta")}, r"several devices.*meta"),
        ({"uniforms": torch.ones(3)}, r"uniforms\[0\] is 1\.0; it must .* below 1"),
        (
            {
                "ids": torch.arange(11, 61),
                "out": (ids(0, 0, 0), zeros(3), zeros(3, 60)),
            },
            r"ids\[49\] is 60; probabilities has 60 columns",
        ),
        (
            {"out": (ids(0, 0, 0), zeros(3), zeros(3, 60))},
            r"probabilities has shape \[3, 60\], not \[B=3, V=50\]",
        ),
    ],
}

WRONG_TYPES: dict[str, list[tuple[Arguments, str]]] = {
    "paged_sparse_attention": [
        ({"queries": zeros(3, 4, 32, dtype=DOUBLE)}, r"queries is torch\.float64"),
        ({"queries": zeros(3, 4, 32, dtype=HALF)}, r"key_pages .*32, not .*float16"),
        ({"key_pages": zeros(5, 8, 2, 32).byte()}, r"key_pages is torch\.uint8"),
        ({"value_pages": zeros(5, 8, 2, 32).half()}, r"value_pages is torch\.float16"),
        ({"page_table": zeros(2, 3)}, r"page_table is torch\.float32, not .*int32"),
        ({"lengths": torch.ones(2)}, r"lengths is torch\.float32"),
        ({"query_starts": torch.ones(3).short()}, r"query_starts is torch\.int16"),
        ({"key_scale": torch.ones(2).half()}, r"key_scale is torch\.float16"),
        ({"value_scale": torch.ones(2).double()}, r"value_scale is torch\.float64"),
        (
            {"page_attention": zeros(3, 4, 3).half()},
            r"page_attention .*16, not torch\.float32",
        ),
        ({"key_rotary": (ROTARY[0].double(), ROTARY[1])}, r"cos is torch\.float64"),
        ({"key_rotary": (ROTARY[0], ROTARY[1].int())}, r"sin is torch\.int32"),
    ],
    "paged_cache_write": [
        ({"qkv": zeros(3, 6, 32, dtype=DOUBLE)}, r"qkv is torch\.float64"),
        ({"cos": zeros(3, 32, dtype=DOUBLE)}, r"cos is torch\.float64"),
        ({"sin": zeros(3, 32).int()}, r"sin is torch\.int32"),
        ({"key_pages": zeros(5, 8, 2, 32).half()}, r"key_pages .*16, not .*float8"),
        ({"value_pages": zeros(5, 8, 2, 32).byte()}, r"value_pages is torch\.uint8"),
        ({"cells": ids(0, 1, 2).int()}, r"cells is torch\.int32, not torch\.int64"),
        ({"norms": (zeros(32), zeros(32).half(), 0.0)}, r"key_norm .*float16"),
        ({"key_scale": torch.ones(2).half()}, r"key_scale is torch\.float16"),
        ({"value_scale": torch.ones(2).int()}, r"value_scale is torch\.int32"),
    ],
    "page_compaction": [
        ({"keys": zeros(2, 9, 2, 32, dtype=DOUBLE)}, r"keys is torch\.float64"),
        ({"values": zeros(2, 9, 2, 32).to(FP8)}, r"values is torch\.float8_e4m3fn"),
        ({"kept": zeros(2, 2, 3).int()}, r"kept is torch\.int32"),
        ({"key_pages": zeros(2, 5, 8, 2, 32).half()}, r"key_pages is torch\.float16"),
        ({"value_pages": zeros(2, 5, 8, 2, 32).int()}, r"value_pages is torch\.int32"),
        ({"cells": ids(0, 1, 2).int()}, r"cells is torch\.int32"),
        ({"key_scale": torch.ones(2, 2).half()}, r"key_scale is torch\.float16"),
        ({"value_scale": torch.ones(2, 2).half()}, r"value_scale is torch\.float16"),
    ],
    "chunk_scores": [
        ({"keys": zeros(2, 3, 9, 32).int()}, r"keys is torch\.int32"),
        (
            {"queries": zeros(2, 3, 2, 4, 32).half()},
            r"queries .*16, not torch\.float32",
        ),
    ],
    "greedy_pick": [
        ({"logits": zeros(3, 50, dtype=DOUBLE)}, r"logits is torch\.float64"),
        ({"logits": zeros(3, 50).long()}, r"logits is torch\.int64"),
        ({"ids": torch.arange(50).int()}, r"ids is torch\.int32, not torch\.int64"),
    ],
    "sampled_pick": [
        ({"logits": zeros(3, 50, dtype=DOUBLE)}, r"logits is torch\.float64"),
        ({"temperatures": torch.ones(3).half()}, r"temperatures is torch\.float16"),
        ({"uniforms": torch.zeros(3).half()}, r"uniforms is torch\.float16"),
    ],
}

both = pytest.mark.parametrize("module", [reference, fused], ids=["reference", "fused"])


def cases(wrong: dict[str, list[tuple[Arguments, str]]]) -> list[Any]:
    return [
        pytest.param(operation, change, message, id=f"{operation}-{message}")
        for operation, changes in wrong.items()
        for change, message in changes
    ]


def on(device: torch.device, argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(on(device, x) for x in argument)
    if isinstance(argument, torch.Tensor) and argument.device.type != "meta":
        # What .to() moves may be laid out anew.
        moved = torch.empty_strided(
            argument.shape, argument.stride(), dtype=argument.dtype, device=device
        )
        return moved.copy_(argument)
    return argument


def call(module: Any, operation: str, change: Arguments, device: torch.device) -> Any:
    arguments = {**VALID[operation](), **change}
    arguments = {name: on(device, x) for name, x in arguments.items()}
    return getattr(module, operation)(**arguments)


@both
@pytest.mark.parametrize("operation", VALID)
def test_right_arguments_are_taken(operation, module, device):
    call(module, operation, {}, device)


def test_every_operation_is_checked():
    assert set(VALID) == set(WRONG_VALUES) == set(WRONG_TYPES)
    assert set(VALID) | CHECKED_ELSEWHERE == set(fused.__all__)


@both
@pytest.mark.parametrize(("operation", "change", "message"), cases(WRONG_VALUES))
def test_wrong_values_are_refused(operation, change, message, module, device):
    with pytest.raises(ValueError, match=message):
        call(module, operation, change, device)


@both
@pytest.mark.parametrize(("operation", "change", "message"), cases(WRONG_TYPES))
def test_wrong_types_are_refused(operation, change, message, module, device):
    with pytest.raises(TypeError, match=message):
        call(module, operation, change, device)
