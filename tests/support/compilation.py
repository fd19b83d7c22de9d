"""Compiles kernels for a GPU that is not there, with the arguments of real calls.

    python -m tests.support.compilation 90

Prints one JSON object by case: for each kernel that it launched, what the GPU's
assembler says of it. Runs by itself, for a process that interprets cannot compile.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from budgetdraft_kernels import launch_settings

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def attention(
    head_dim: int,
    dtype: str = "bfloat16",
    *,
    fp8: bool = False,
    group: int = 4,
    width: int = 1,
    rotary: bool = False,
    mass: bool = False,
    page_size: int = 16,
    batch: int = 2,
) -> None:
    from budgetdraft_kernels.fused import paged_sparse_attention

    kind, kv_heads, held = DTYPES[dtype], 2, -(-2048 // page_size)
    stored = torch.float8_e4m3fn if fp8 else kind
    pages = torch.zeros(held, page_size, kv_heads, head_dim).to(stored)
    table = torch.arange(held).expand(batch, -1).contiguous()
    scale = torch.ones(kv_heads) if fp8 else None
    angles = torch.zeros(held * page_size, head_dim)
    paged_sparse_attention(
        torch.zeros(batch * width, kv_heads * group, head_dim, dtype=kind),
        pages,
        pages.clone(),
        table,
        torch.full([batch], 2048),
        torch.arange(batch + 1) * width,
        max_query_tokens=width,
        key_scale=scale,
        value_scale=scale,
        key_rotary=(angles, angles) if rotary else None,
        page_mass=torch.zeros(batch * width, kv_heads * group, held) if mass else None,
    )


def companions(head_dim: int, dtype: str = "bfloat16", fp8: bool = False) -> None:
    from budgetdraft_kernels import fused

    kind, layers, heads, kv_heads = DTYPES[dtype], 2, 8, 2
    pages = torch.zeros(layers, 8, 16, kv_heads, head_dim, dtype=kind)
    pages = pages.to(torch.float8_e4m3fn) if fp8 else pages
    scales = torch.ones(layers, kv_heads)
    angles = torch.zeros(3, head_dim)
    fused.paged_cache_write(
        torch.zeros(3, heads + 2 * kv_heads, head_dim, dtype=kind),
        angles,
        angles,
        pages[0],
        pages[1],
        torch.arange(3),
        key_scale=scales[0],
        value_scale=scales[1],
    )
    prompt = torch.zeros(layers, 100, kv_heads, head_dim, dtype=kind)
    kept = torch.arange(64).expand(layers, kv_heads, -1).contiguous()
    fused.page_compaction(
        prompt,
        prompt,
        kept,
        pages,
        pages,
        torch.arange(64),
        key_scale=scales,
        value_scale=scales,
    )
    keys = prompt.transpose(1, 2)
    fused.chunk_scores(keys, keys[:, :, -1:], 8, "mean_key")
    fused.chunk_scores(keys, keys[:, :, -16:], 8, "attention")
    logits = torch.zeros(2, 32_000, dtype=kind)
    fused.greedy_pick(logits)
    fused.gumbel_pick(logits, torch.ones(2), torch.arange(2))


HEAD_DIMS = (32, 64, 80, 96, 128, 256)
CASES: dict[str, Callable[[], None]] = {
    **{f"attention-{dim}": partial(attention, dim) for dim in HEAD_DIMS},
    **{f"companions-{dim}": partial(companions, dim) for dim in HEAD_DIMS},
    "attention-float32": partial(attention, 128, "float32"),
    "attention-float16": partial(attention, 128, "float16"),
    "attention-fp8": partial(attention, 128, fp8=True),
    "companions-float32": partial(companions, 128, "float32"),
    "companions-fp8": partial(companions, 128, fp8=True),
    "attention-wide": partial(attention, 128, width=32, group=16),
    "attention-wide-256": partial(attention, 256, width=32, group=16),
    "attention-mha": partial(attention, 128, group=1),
    "attention-rotary": partial(attention, 128, rotary=True),
    "attention-rotary-80": partial(attention, 80, rotary=True),
    "attention-mass": partial(attention, 128, mass=True),
    "attention-pages-of-64": partial(attention, 128, page_size=64),
    "attention-pages-of-24": partial(attention, 128, page_size=24),
    "attention-one-split": partial(attention, 128, batch=256),
}


class AbsentGPU:
    """What Triton asks of a driver before it has to load anything."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    capability = int(sys.argv[1])
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(AbsentGPU(capability))
    settings = launch_settings.SETTINGS[divmod(capability, 10)]
    launch_settings.settings_of = lambda device: settings
    launch_settings.multiprocessors = lambda device: 132  # of an H100 or H200

    launched: list[Any] = []
    run = JITFunction.run

    @wraps(run)
    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        launched.append(kernel)
        return kernel

    JITFunction.run = compile_only
    report = {}
    for name, case in CASES.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        launched.clear()
        case()
        report[name] = [resources(kernel) for kernel in launched]
    print(json.dumps(report))


def resources(kernel: Any) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.metadata.name,
        "registers": found["REG"],
        "stack_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "widest_load": max(
            (
                int(n)
                for n in re.findall(r"ld\.global\S*\.v(\d)\.b32", kernel.asm["ptx"])
            ),
            default=1,
        ),
        "async_copies": sorted(
            set(
                re.findall(
                    r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)",
                    kernel.asm["ptx"],
                )
            )
        ),
    }


if __name__ == "__main__":
    main()
