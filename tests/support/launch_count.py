"""How many kernels a GPU would be asked for, counted on a CPU.

An operation of PyTorch counts as one kernel, unless it makes a view or allocates; so
does a launch of a Triton kernel, which is interpreted here. cuBLAS may take a second
kernel for a product that it splits.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import memset
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that give memory and write none of it, and one that is a view by nature.
NO_KERNELS = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")


@contextmanager
def idle_kernels(are_idle: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Our kernels, interpreted, are launched and compute nothing, which takes no time.

    What they would have written holds zeros: of ids and positions, valid ones.

    Args:
        are_idle: asked at every launch.
    """
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_unless_idle(executor: Any, *args: Any, **kwargs: Any) -> None:
        is_ours = executor.fn.__globals__["__name__"].startswith("budgetdraft_kernels")
        if not (is_ours and are_idle()):
            launch(executor, *args, **kwargs)

    def zeroed(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(allocate)
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if are_idle() and x.device.type == "cpu":
                # By no operation, which would be counted.
                memset(x.data_ptr(), 0, x.untyped_storage().nbytes())
            return x

        return allocated

    with ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            fake = zeroed(getattr(owner, name))
            stack.enter_context(patch.object(owner, name, fake))
        stack.enter_context(patch.object(GridExecutor, "__call__", launch_unless_idle))
        yield


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Kernels by name, as they are launched."""
    from triton.runtime.interpreter import GridExecutor

    launches: Counter[str] = Counter()
    launch, is_inside = GridExecutor.__call__, False

    def as_one(name: str, call: Callable[[], Any]) -> Any:
        """Whatever the call does on a CPU, it is one kernel on a GPU."""
        nonlocal is_inside
        if is_inside:
            return call()
        launches[name] += 1
        is_inside = True
        try:
            return call()
        finally:
            is_inside = False

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            def call() -> Any:
                return func(*args, **(kwargs or {}))

            # Several operations on a CPU, and one on a GPU.
            return as_one("rms_norm", call) if func is torch.rms_norm else call()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if not is_inside and name not in NO_KERNELS and not func.is_view:
                launches[name] += 1
            return func(*args, **(kwargs or {}))

    def launch_as_one(executor: Any, *args: Any, **kwargs: Any) -> None:
        as_one(executor.fn.__name__, lambda: launch(executor, *args, **kwargs))

    with (
        Functions(),
        Operations(),
        patch.object(GridExecutor, "__call__", launch_as_one),
    ):
        yield launches
