"""Where a GPU goes, without one: the same branches, on tensors of a CPU.

Graphs are fake ones, events take the time of a clock, and no memory is pinned. Kernels
run in Triton's interpreter, whose launches ``Launches`` writes down as the compiler of
a GPU would tell them apart.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from tests.support import runner_v2
from tests.support.fake_graph import FakeGraph
from tests.support.launch_count import idle_kernels
from vllm_budgetdraft.attention import backend


class ClockEvent:
    """``torch.cuda.Event`` of a device that is never behind."""

    def __init__(self, **options: bool) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def wait(self, stream: Any = None) -> None:
        """Nor here."""

    def elapsed_time(self, end: "ClockEvent") -> float:
        """Milliseconds."""
        return 1000 * (end._time - self._time)


class CudaGraph(FakeGraph):
    """``torch.cuda.CUDAGraph``."""

    def replay(self) -> None:
        self()


def _without_pinning(allocate: Callable) -> Callable:
    return wraps(allocate)(
        lambda *args, pin_memory=False, **kwargs: allocate(*args, **kwargs)
    )


@contextmanager
def cpus_are_gpus() -> Iterator[None]:
    """What asks for a GPU gets a CPU."""
    zeros = _without_pinning(torch.zeros)
    with ExitStack() as stack:
        for owner, name, fake in (
            (backend, "GPU_TYPES", {"cuda", "cpu"}),
            (torch, "zeros", zeros),
            (torch.cuda, "graph_pool_handle", lambda: None),
            (torch.cuda, "CUDAGraph", CudaGraph),
            (torch.cuda, "graph", lambda graph, pool: graph.record()),
            (torch.cuda, "Event", ClockEvent),
        ):
            stack.enter_context(patch.object(owner, name, fake))
        yield


@contextmanager
def every_argument_is_checked(operations: ModuleType) -> Iterator[None]:
    """Has operations check what they are given though they are told not to.

    Serving tells them so, for it costs time. A kernel then reads strides that are not
    there, and nothing says so. What a graph records was checked just before, when it
    was run for the first time.
    """
    with ExitStack() as stack:
        for name in operations.__all__:
            operation = getattr(operations, name)

            def checked(*args: Any, operation: Callable = operation, **kwargs: Any):
                if kwargs.get("validate") is False and not FakeGraph.num_open:
                    kwargs["validate"] = True
                return operation(*args, **kwargs)

            stack.enter_context(
                patch.object(operations, name, wraps(operation)(checked))
            )
        yield


class Launches:
    """Kernels that were launched, as a GPU's compiler tells them apart.

    Triton compiles a kernel again for another type, None, constant, or another answer
    to whether a number is 1 or a multiple of 16, or an address a multiple of 16.

    Attributes:
        keys: of each launch, the kernel, and what it is compiled for.
    """

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()

    @contextmanager
    def record(self) -> Iterator["Launches"]:
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        def run_and_note(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            launched = {k: v for k, v in kwargs.items() if k not in ("grid", "warmup")}
            name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
            self.keys.add((name, _compiled_for(kernel, args, launched)))
            return run(kernel, *args, **kwargs)

        with patch.object(InterpretedFunction, "run", run_and_note):
            yield self

    def since(self, known: set[tuple[str, str]], *modules: str) -> list[str]:
        """Kernels of some modules that would have been compiled since then."""
        later = {name for name, _ in self.keys - known}
        return sorted(name for name in later if any(each in name for each in modules))


def _compiled_for(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    _, specialization, options = _binder(kernel)(*args, **kwargs)
    return f"{specialization} {options}"


@cache
def _binder(kernel: Any) -> Callable:
    """Triton's own function from the arguments of a launch to what is compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    names = ("do_not_specialize", "do_not_specialize_on_alignment")
    compiled = JITFunction(kernel.fn, **{n: kernel.kwargs.get(n) for n in names})
    compiler = CUDABackend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(compiled.signature, compiled.params, compiler)


#: Of the process of an engine that ``prepare_v1`` or ``prepare_v2`` prepared.
engine_launches = Launches()
_contexts = ExitStack()  # which nobody leaves
_is_starting = True


def finish_start_up() -> None:
    """From now on kernels compute; before, when all is tried, they were idle."""
    global _is_starting
    _is_starting = False


def prepare_v1() -> None:
    """Has the engine of this process believe that it is on a GPU, with runner V1."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    runner_v2.interpret_kernels()
    _prepare()


def prepare_v2() -> None:
    """The same with runner V2, which schedules ahead."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    runner_v2.schedule_ahead()
    _prepare()


def _prepare() -> None:
    import vllm.v1.worker.cpu.shm  # noqa: F401, for it has events of its own
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    from budgetdraft_kernels import fused

    # The interpreter cannot run this kernel of vLLM's.
    sampler.apply_top_k_top_p_triton = sampler.apply_top_k_top_p_pytorch
    _contexts.enter_context(cpus_are_gpus())
    _contexts.enter_context(every_argument_is_checked(fused))
    _contexts.enter_context(idle_kernels(lambda: _is_starting))
    _contexts.enter_context(engine_launches.record())
