"""vLLM's model runner V2 without a GPU: its Triton kernels run in the interpreter.

vLLM for CPUs comes with that runner, but uses it only where Triton has a backend for
CPUs, which is on no package index. The interpreter takes its place.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal


def in_every_process() -> None:
    """Has Python processes that are started from now on begin with this, too."""
    support = Path(__file__).parent
    roots = (support / "startup_v2", support.parents[1], support.parents[1] / "kernels")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, roots))
    schedule_ahead()


def interpret_kernels() -> None:
    """To be called before vLLM is imported, in the process of the engine."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = (
        "1"  # which would ask that backend for a compiler
    )
    from triton import backends

    from tests.support import interpreter

    interpreter.mend()
    driver = SimpleNamespace(is_active=lambda: True)
    backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def schedule_ahead() -> None:
    """As ``interpret_kernels``, and has vLLM schedule asynchronously, as on a GPU.

    Until 0.33 it allows that by the name of the method, though the runner would not
    mind. Ours goes by "custom_class".
    """
    interpret_kernels()
    import vllm.config.vllm as config
    from vllm.platforms.cpu import CpuPlatform

    config.NgramGPUTypes = Literal["ngram_gpu", "custom_class"]

    update = CpuPlatform.check_and_update_config.__func__

    def update_and_schedule_ahead(cls: type, vllm_config: Any) -> None:
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(update_and_schedule_ahead)
