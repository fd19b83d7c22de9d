"""Compiles kernels for a GPU that is not there, with the arguments of real calls.

    python -m tests.support.compilation 90

Prints one JSON object by case: for each kernel that it needed, what the GPU's assembler
says of it. Arguments have no memory, so that nothing can be read back on the way. Runs
by itself, for a process that interprets cannot compile.

Registers differ between versions of Triton. To look at another than the installed one:

    pip install --no-deps --target OTHER triton==3.6.0
    PYTHONPATH=OTHER:kernels:. python -m tests.support.compilation 90

With ``PYTHONPATH=OTHER`` the tests of ``tests/kernel_parity`` use that one as well.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch

from budgetdraft_kernels import launch_settings

FP8, BF16, FLOAT32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
#: Tokens that a request may hold.
CAPACITY = 2048


@dataclass(frozen=True)
class Attention:
    """One call of ``paged_sparse_attention``."""

    head_dim: int = 128
    dtype: torch.dtype = BF16
    fp8: bool = False
    group: int = 4
    width: int = 1
    rotary: bool = False
    shares: bool = False
    page_size: int = 16
    batch: int = 2

    def __call__(self) -> None:
        from budgetdraft_kernels.fused import paged_sparse_attention

        kv_heads, held = 2, -(-CAPACITY // self.page_size)
        heads, tokens = kv_heads * self.group, self.batch * self.width
        pages = torch.zeros(held, self.page_size, kv_heads, self.head_dim)
        pages = pages.to(FP8 if self.fp8 else self.dtype)
        scale = torch.ones(kv_heads) if self.fp8 else None
        angles = torch.zeros(held * self.page_size, self.head_dim)
        paged_sparse_attention(
            torch.zeros(tokens, heads, self.head_dim, dtype=self.dtype),
            pages,
            pages,
            torch.arange(held).repeat(self.batch, 1),
            torch.full([self.batch], CAPACITY),
            torch.arange(self.batch + 1) * self.width,
            max_query_tokens=self.width,
            key_scale=scale,
            value_scale=scale,
            key_rotary=(angles, angles) if self.rotary else None,
            page_attention=torch.zeros(tokens, heads, held) if self.shares else None,
            validate=False,
        )


@dataclass(frozen=True)
class Companions:
    """One call of each other operation."""

    head_dim: int = 128
    dtype: torch.dtype = BF16
    fp8: bool = False
    has_norms: bool = False

    def __call__(self) -> None:
        from budgetdraft_kernels import fused

        layers, heads, kv_heads, tokens = 2, 8, 2, 3
        pages = torch.zeros(layers, 8, 16, kv_heads, self.head_dim)
        pages = pages.to(FP8 if self.fp8 else self.dtype)
        scales = torch.ones(layers, kv_heads)
        angles = torch.zeros(tokens, self.head_dim)
        norm = torch.ones(self.head_dim, dtype=self.dtype)
        fused.paged_cache_write(
            torch.zeros(tokens, heads + 2 * kv_heads, self.head_dim, dtype=self.dtype),
            angles,
            angles,
            pages[0],
            pages[1],
            torch.arange(tokens),
            norms=(norm, norm, 1e-6) if self.has_norms else None,
            key_scale=scales[0],
            value_scale=scales[1],
            validate=False,
        )
        prompt = torch.zeros(layers, 100, kv_heads, self.head_dim, dtype=self.dtype)
        fused.page_compaction(
            prompt,
            prompt,
            torch.arange(64).repeat(layers, kv_heads, 1),
            pages,
            pages,
            torch.arange(64),
            key_scale=scales,
            value_scale=scales,
            validate=False,
        )
        keys = prompt.transpose(1, 2)
        fused.chunk_scores(keys, keys[:, :, None, -1:], 8, "mean_key")
        fused.chunk_scores(keys, keys[:, :, None, -16:], 8, "attention")
        queries = torch.zeros(30, heads, self.head_dim, dtype=self.dtype)
        fused.accumulated_attention(queries, prompt[0], validate=False)
        logits = torch.zeros(2, 32_000, dtype=self.dtype)
        fused.greedy_pick(logits, validate=False)
        fused.sampled_pick(logits, torch.ones(2), torch.zeros(2), validate=False)
        ids = torch.zeros(logits.shape[1], dtype=torch.int64)
        fused.greedy_pick(logits, ids=ids, validate=False)
        out = ids[:2], torch.zeros(2), torch.zeros(2, logits.shape[1])
        fused.sampled_pick(
            logits, out[1], torch.zeros(2), ids=ids, out=out, validate=False
        )


@dataclass(frozen=True)
class Linear:
    """The products of a layer with so many tokens."""

    tokens: int = 1
    dtype: torch.dtype = BF16
    hidden: int = 768
    inner: int = 3072

    def __call__(self) -> None:
        from budgetdraft_kernels.fused import linear

        def new(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype)

        x, norm = new(self.tokens, self.hidden), new(self.hidden)
        up, down = new(2 * self.inner, self.hidden), new(self.hidden, self.inner)
        bias = new(2 * self.inner)
        h = linear(x, up, bias, norm=norm, eps=1e-6, gated=True, validate=False)
        linear(h, down, residual=x, validate=False)
        linear(x, up, norm=norm, eps=1e-6, validate=False)


def batches_of_any_size() -> None:
    """What a server asks for as requests come and go."""
    for batch in (1, 2, 3, 7, 16, 33, 200):
        for width in (2, 1):
            Attention(batch=batch, width=width)()
            Linear(batch * width)()


def prompts_of_any_length() -> None:
    """What a server reads of prompts, whole and in part."""
    from budgetdraft_kernels.fused import accumulated_attention

    for num_queries, num_keys in (
        (1, 1),
        (1, 17),
        (16, 16),
        (333, 2048),
        (4096, 10_000),
    ):
        queries = torch.zeros(num_queries, 8, 128, dtype=BF16)
        keys = torch.zeros(num_keys, 2, 128, dtype=BF16)
        accumulated_attention(queries, keys, validate=False)


HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DECODING: dict[str, Attention] = {
    **{f"attention-{dim}": Attention(dim) for dim in HEAD_DIMS},
    "attention-float32": Attention(dtype=FLOAT32),
    "attention-float32-32": Attention(32, FLOAT32),
    "attention-float16": Attention(dtype=torch.float16),
    "attention-fp8": Attention(fp8=True),
    "attention-mha": Attention(group=1),
    "attention-rotary": Attention(rotary=True),
    "attention-rotary-80": Attention(80, rotary=True),
    "attention-shares": Attention(shares=True),
    "attention-shares-float32": Attention(dtype=FLOAT32, shares=True),
    "attention-pages-of-64": Attention(page_size=64),
    "attention-pages-of-24": Attention(page_size=24),
    "attention-one-split": Attention(batch=256),
}
ATTENTION: dict[str, Attention] = {
    **DECODING,
    "attention-wide": Attention(width=32, group=16),
    "attention-wide-256": Attention(256, width=32, group=16),
    "attention-rotary-fp8-256": Attention(256, rotary=True, fp8=True),
    "attention-wide-float32": Attention(dtype=FLOAT32, width=32, group=16),
    "attention-float32-rotary-64": Attention(64, FLOAT32, rotary=True),
}
CASES: dict[str, Callable[[], None]] = {
    **ATTENTION,
    **{f"companions-{dim}": Companions(dim) for dim in HEAD_DIMS},
    "batches": batches_of_any_size,
    "prompts": prompts_of_any_length,
    "companions-float32": Companions(dtype=FLOAT32),
    "companions-float32-64": Companions(64, FLOAT32),
    "companions-float16": Companions(dtype=torch.float16),
    "companions-fp8": Companions(fp8=True),
    "companions-norms": Companions(has_norms=True),
    "companions-norms-80": Companions(80, has_norms=True),
    **{f"linear-{tokens}": Linear(tokens) for tokens in (1, 17, 64)},
    "linear-float16": Linear(64, torch.float16),
    "linear-float32": Linear(dtype=FLOAT32),
    "linear-float32-64": Linear(64, FLOAT32),
    "linear-of-odd-sizes": Linear(hidden=100, inner=63),
    # Heads of 256 would spill 256 bytes here, and nowhere else.
    "attention-float32-fp8": Attention(dtype=FLOAT32, fp8=True),
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


def spills_in_loops(assembly: str) -> int:
    """Loads and stores of spilled registers between a backward jump and its target."""
    found = re.findall(r"/\*(\w+)\*/ +(?:@!?\w+ )?(STL|LDL|BRA)(.*?);", assembly)
    spills, loops = [], []
    for address, name, operands in found:
        if name == "BRA":
            (target,) = re.findall(r"0x\w+", operands)
            loops.append((int(target, 16), int(address, 16)))
        else:
            spills.append(int(address, 16))
    return sum(any(first <= at <= last for first, last in loops) for at in spills)


@cache
def resources(kernel: Any) -> dict[str, Any]:
    """What one compiled kernel takes of a multiprocessor, and how it reads memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dumped(option: str) -> str:
            command = [tool, option, file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout

        usage = dumped("--dump-resource-usage")
        found = {n: int(x) for n, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        stack_bytes = found["STACK"] + found["LOCAL"]
        # Without a stack nothing is spilled, and disassembling is slow.
        spills = spills_in_loops(dumped("--dump-sass")) if stack_bytes else 0
    copies = r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)"
    return {
        "kernel": kernel.metadata.name,
        "threads": 32 * kernel.metadata.num_warps,
        "registers": found["REG"],
        "stack_bytes": stack_bytes,
        "spills_in_loops": spills,
        "shared_bytes": kernel.metadata.shared,
        "async_copy_bytes": sorted(
            {int(n, 16) for n in re.findall(copies, kernel.asm["ptx"])}
        ),
    }


def main() -> None:
    capability = int(sys.argv[1])
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(AbsentGPU(capability))
    settings = launch_settings.SETTINGS.get(
        divmod(capability, 10), launch_settings.DEFAULT
    )
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
        launched.clear()
        with torch.device("meta"):
            case()
        report[name] = [resources(kernel) for kernel in dict.fromkeys(launched)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
