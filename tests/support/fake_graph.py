"""A graph without a GPU: what a CUDA graph would hold, and what it would refuse."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Functions that read on the host what the device computes, or wait for it.
HOST_READS = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "unique", "equal", "allclose"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "synchronize"),
}
#: Functions that bring to the device what the host holds.
HOST_WRITES = {"tensor", "as_tensor", "from_numpy", "pin_memory", "cuda"}
#: A result's shape depends on what the device computes, or the result is no tensor.
WAITING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class GraphError(RuntimeError):
    """A CUDA graph could not hold this."""


class FakeGraph:
    """What a function did, to be done again on the same memory.

    As a CUDA graph it holds operations and addresses, and no Python: a replay reads the
    tensors that capturing read, and writes those that it wrote, whatever the function
    would look at or allocate now.

    Attributes:
        num_open: graphs that are being recorded now, of any thread.
    """

    num_open = 0

    def __init__(self, function: Callable[[], None] | None = None) -> None:
        """
        Args:
            function: what is to be recorded; without it ``record`` does.
        """
        self._work: list[Callable[[], None]] = []
        self._is_paused = False
        if function is not None:
            with self.record():
                function()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Records what is done meanwhile, as it is done.

        Raises:
            GraphError: a CUDA graph could not hold it.
        """
        graph = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                name = getattr(func, "__name__", "")
                if not graph._is_paused and name in HOST_READS | HOST_WRITES:
                    raise GraphError(f"{name} in a graph")
                return func(*args, **(kwargs or {}))

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                kwargs = kwargs or {}
                if graph._is_paused:
                    return func(*args, **kwargs)
                if _waits(func, args):
                    raise GraphError(f"{func} in a graph")
                result = func(*args, **kwargs)
                graph._record(func, args, kwargs, result)
                return result

        with Functions(), Operations(), self._kernels():
            FakeGraph.num_open += 1
            try:
                yield
            finally:
                FakeGraph.num_open -= 1

    def __call__(self) -> None:
        with torch.inference_mode():
            for work in self._work:
                work()

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        fresh = list(_allocated(args, kwargs, result))
        if not fresh and not func._schema.is_mutable:
            return  # a view of memory that the graph holds

        def work() -> None:
            for old, new in zip(
                fresh, _allocated(args, kwargs, func(*args, **kwargs)), strict=True
            ):
                assert (new.shape, new.stride()) == (old.shape, old.stride()), func
                old.copy_(new)

        self._work.append(work)

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Launches of interpreted Triton kernels are work of the graph, too."""
        try:
            from triton.runtime.interpreter import GridExecutor
        except ImportError:
            yield
            return
        launch, graph = GridExecutor.__call__, self

        def launch_and_record(executor: Any, *args: Any, **kwargs: Any) -> None:
            graph._is_paused = True
            try:
                launch(executor, *args, **kwargs)
            finally:
                graph._is_paused = False
            graph._work.append(lambda: launch(executor, *args, **kwargs))

        with patch.object(GridExecutor, "__call__", launch_and_record):
            yield


@contextmanager
def forbid_host_reads() -> Iterator[None]:
    """Fails where the host would wait for what the device computes."""

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name in HOST_READS:
                raise GraphError(f"{name} waits for the device")
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if _waits(func, args):
                raise GraphError(f"{func} waits for the device")
            return func(*args, **(kwargs or {}))

    with Functions(), Operations():
        yield


@contextmanager
def forbid_host_writes() -> Iterator[None]:
    """Fails where the host would copy to the device."""

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name in HOST_WRITES:
                raise GraphError(f"{name} copies to the device")
            return func(*args, **(kwargs or {}))

    def from_numpy(array: Any) -> Tensor:  # no mode hears of it
        raise GraphError("from_numpy copies to the device")

    with Functions(), patch.object(torch, "from_numpy", from_numpy):
        yield


@contextmanager
def forbid_allocation() -> Iterator[None]:
    """Fails at an operation whose result is not in memory that it was given.

    Replays of a ``FakeGraph`` are the exception: they stand for a graph's own memory.
    """
    is_replaying = False
    replay = FakeGraph.__call__

    def watched_replay(graph: FakeGraph) -> None:
        nonlocal is_replaying
        is_replaying = True
        replay(graph)
        is_replaying = False

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if not is_replaying and list(_allocated(args, kwargs, result)):
                raise GraphError(f"{func} allocates")
            return result

    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeGraph, "__call__", watched_replay))
        stack.enter_context(Operations())
        yield


def _allocated(args: Any, kwargs: Any, result: Any) -> Iterator[Tensor]:
    """Tensors of a result that share no memory with what it was computed from."""
    given = {
        x.untyped_storage().data_ptr()
        for x in tree_leaves((args, kwargs))
        if isinstance(x, Tensor)
    }
    for x in tree_leaves(result):
        if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
            yield x


def _waits(func: Any, args: Any) -> bool:
    """Whether the host must know what the device computed, to go on."""
    aten = torch.ops.aten
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        indices = tree_leaves(args[1])  # with a mask, as many as it has True
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in indices)
    return bool(WAITING_TAGS & set(func.tags))
