"""How many kernels a GPU would be asked for, counted on a CPU.

An operation of PyTorch counts as one kernel, unless it makes a view or allocates; so
does a launch of a Triton kernel, which is interpreted here. cuBLAS may take a second
kernel for a product that it splits.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that give memory and write none of it, and one that is a view by nature.
NO_KERNELS = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")


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
