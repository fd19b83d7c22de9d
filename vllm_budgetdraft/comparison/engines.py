"""The engines of several methods, which start together where there is room."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_budgetdraft.comparison.methods import Method
from vllm_budgetdraft.comparison.room import GIB, Memory, Need, side_by_side
from vllm_budgetdraft.errors import BudgetDraftError, ConfigurationError

#: After so long without news of an engine that starts, there is some.
SILENT_SECONDS = 15.0


def needed_bytes(
    methods: list[Method], engine_args: dict[str, Any], memory: Memory
) -> list[int]:
    """Of each method's engine, estimated."""
    return [
        Need.of({**engine_args, **method.engine_args}, memory).total_bytes
        for method in methods
    ]


def groups_that_fit(
    methods: list[Method], needs: list[int], free_bytes: int, engines_at_once: int
) -> list[list[Method]]:
    """Groups of plain vLLM and at most ``engines_at_once`` others, each once.

    Args:
        needs: bytes of each method's engine.

    Raises:
        ConfigurationError: one engine does not fit beside plain vLLM's.
    """
    plain, *others = zip(methods, needs, strict=True)
    if not others:
        return [[methods[0]]]
    for size in range(engines_at_once, 0, -1):
        groups = [
            [plain, *others[first : first + size]]
            for first in range(0, len(others), size)
        ]
        if all(sum(need for _, need in group) <= free_bytes for group in groups):
            return [[method for method, _ in group] for group in groups]
    largest, need = max(others, key=lambda each: each[1])
    raise ConfigurationError(
        f"{plain[0].name} and {largest.name} side by side need about "
        f"{(plain[1] + need) / GIB:.1f} GiB, and {free_bytes / GIB:.1f} GiB are free; "
        "free memory, use shorter contexts or smaller models, or give vLLM a smaller "
        "cache, as with --engine-args '{\"kv_cache_memory_bytes\": 1000000000}'"
    )


def together_or_in_turn(
    methods: list[Method],
    engine_args: dict[str, Any],
    memory: Memory,
    tell: Callable[[str], None],
) -> list[list[Method]]:
    """One group, or one for each method if memory is short, plain vLLM last."""
    needs = needed_bytes(methods, engine_args, memory)
    if sum(needs) <= memory.free_bytes:
        return [methods]
    tell(
        f"one engine after the other: together they need about {sum(needs) / GIB:.1f} "
        f"GiB, and {memory.free_bytes / GIB:.1f} GiB are free"
    )
    return [[method] for method in reversed(methods)]


def check_engine(engine_args: dict[str, Any]) -> Any:
    """vLLM's config, after all that it and we check before weights are loaded.

    Raises:
        BudgetDraftError: an engine with these arguments would not start.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_budgetdraft.vllm_integration.plugin import register

    register()
    try:
        return EngineArgs(**engine_args).create_engine_config()
    except BudgetDraftError:
        raise
    except (OSError, TypeError, ValueError) as error:
        why = str(error)
        if isinstance(error, ValidationError):  # whose text is a table of inputs
            why = "; ".join(each["msg"] for each in error.errors())
        raise ConfigurationError(
            f"vLLM cannot serve {engine_args.get('model')!r} so: {why}"
        ) from error


@contextmanager
def running(
    methods: list[Method],
    engine_args: dict[str, Any],
    memory: Memory,
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The engine of each method by its name, all ready.

    They start at the same time, and ``tell`` hears how that goes. On a CPU the others
    start when the first is ready: what it compiled they find in torch's cache, and
    together each would compile the same.

    Raises:
        BudgetDraftError: an engine did not start; the others are closed, and the logs
            are kept.
    """
    from vllm_budgetdraft.comparison.engine_process import EngineProcess

    begun = time.monotonic()
    logs = Path(tempfile.mkdtemp(prefix="budgetdraft-"))
    together = 1 if memory.device == "cpu" else len(methods)
    with ExitStack() as stack:
        engines: dict[str, EngineProcess] = {}
        for group in (methods[:together], methods[together:]):
            starting: dict[Any, str] = {}
            for method in group:
                arguments = {**engine_args, **method.engine_args}
                if len(methods) > 1:
                    arguments = side_by_side(arguments, memory)
                log = logs / f"{len(engines)}.log"
                environment = {**_environment(memory), **method.environment}
                engine = EngineProcess(arguments, log, environment)
                engines[method.name] = stack.enter_context(closing(engine))
                starting[engine.connection] = method.name
            while starting:
                ready = wait(list(starting), timeout=SILENT_SECONDS)
                if not ready:
                    seconds = time.monotonic() - begun
                    for name in starting.values():
                        words = engines[name].last_words(1) or "no word of it yet"
                        tell(f"{name} is starting, {seconds:.0f} s so far: {words}")
                for connection in ready:
                    name = starting.pop(connection)
                    try:
                        engines[name].wait_until_ready()
                    except RuntimeError as error:
                        raise BudgetDraftError(
                            f"{name} did not start: {error}"
                        ) from error
                    tell(f"{name} is ready after {time.monotonic() - begun:.0f} s")
        yield engines
    shutil.rmtree(logs)  # only if nothing failed, for errors name files in it


def _environment(memory: Memory) -> dict[str, str]:
    """On a CPU vLLM 0.32 cannot load the code that it saves, and compiles it at each
    start; with this, torch's own cache serves instead. What is set already stays.
    """
    name = "VLLM_USE_AOT_COMPILE"
    return {name: os.environ.get(name, "0")} if memory.device == "cpu" else {}
