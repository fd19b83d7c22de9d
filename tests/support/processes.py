"""Processes of their own for vLLM's engines."""

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

#: What an engine imports, in seconds. Processes are forked from one that has.
IMPORTED = ["vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"]


def nothing() -> None:
    """What a process needs before it imports vLLM, as a rule."""


@contextmanager
def vllm_process(
    prepare: Callable[[], None] = nothing, **environment: str
) -> Iterator[ProcessPoolExecutor]:
    """A process whose engines run within it.

    Args:
        prepare: what it does first, a function of some module's top level.
        environment: variables for it alone; ``tests.conftest`` sets the common ones.
    """
    context = multiprocessing.get_context("spawn")
    if prepare is nothing:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
    # The forkserver keeps the environment that it started with.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
    with ProcessPoolExecutor(
        1, context, initializer=_start, initargs=(prepare, environment)
    ) as processes:
        yield processes


def run_in_process(
    function: Callable[..., Any],
    *args: Any,
    prepare: Callable[[], None] = nothing,
    **environment: str,
) -> Any:
    """What ``function(*args)`` returns in a ``vllm_process`` of its own."""
    with vllm_process(prepare, **environment) as process:
        return process.submit(function, *args).result()


def _start(prepare: Callable[[], None], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    gc.freeze()  # vLLM collects garbage several times as an engine starts
    prepare()
