"""vLLM's model runner V2 without a GPU: its Triton kernels run in the interpreter.

vLLM for CPUs comes with that runner, but uses it only where Triton has a backend for
CPUs, which is on no package index. The interpreter takes its place.
"""

import os
from types import SimpleNamespace


def interpret_kernels() -> None:
    """To be called before vLLM is imported, in the process of the engine."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import backends

    from tests.support import interpreter

    interpreter.mend()
    driver = SimpleNamespace(is_active=lambda: True)
    backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def schedule_ahead() -> None:
    """As ``interpret_kernels``, and lets vLLM schedule asynchronously.

    Until 0.33 vLLM allows that by the name of the method, though the runner does not
    mind. Ours goes by "custom_class".
    """
    from typing import Literal

    interpret_kernels()
    import vllm.config.vllm as config

    config.NgramGPUTypes = Literal["ngram_gpu", "custom_class"]
