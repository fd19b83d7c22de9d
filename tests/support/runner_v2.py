"""vLLM's model runner V2 without a GPU: its Triton kernels run in the interpreter.

vLLM for CPUs comes with that runner, but uses it only where Triton has a backend for
CPUs, which is on no package index. The interpreter takes its place.
"""

import os
from types import SimpleNamespace
from typing import Any


def interpret_kernels() -> None:
    """To be called before vLLM is imported, in the process of the engine."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import backends

    from tests.support import interpreter

    interpreter.mend()
    driver = SimpleNamespace(is_active=lambda: True)
    backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def schedule_ahead() -> None:
    """As ``interpret_kernels``, and has vLLM schedule asynchronously, as on a GPU."""
    interpret_kernels()
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def update_and_schedule_ahead(cls: type, vllm_config: Any) -> None:
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(update_and_schedule_ahead)
