"""Every method on the same prompts, in turns; what it finds goes to a file at once."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_budgetdraft.comparison.methods import Method
from vllm_budgetdraft.comparison.prompts import Prompt

#: OpenMP keeps threads waiting actively for 0.2 s after an engine's last operation, at
#: the cost of the engine whose turn comes next.
PAUSE_SECONDS = 0.5
WARM_UP_TOKENS = 16

#: What every engine is given.
SHARED_ENGINE_ARGS = {
    "max_num_seqs": 4,
    # Every request pays for its own prompt.
    "enable_prefix_caching": False,
}


def prepare_environment() -> None:
    """The same for every engine, before the first starts; what is set already stays.

    On a CPU vLLM would take most of the memory for its cache, which takes a minute.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # vLLM recommends Intel's OpenMP runtime on CPUs, and refuses to run with two.
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if openmp.is_file() and "omp" not in preloaded:
        os.environ["LD_PRELOAD"] = f"{openmp}:{preloaded}" if preloaded else str(openmp)


class RoundsFile:
    """Lines of JSON, each a round: a prompt, and one run of every method in a group."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole) + 1 if whole else 0)  # less a torn end

    def read(self) -> list[dict[str, Any]]:
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def append(self, a_round: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(a_round) + "\n")


def groups_of(methods: list[Method], engines_at_once: int) -> Iterator[list[Method]]:
    """Plain vLLM, and the methods of so many other engines; each comes once."""
    plain, *others = methods
    for first in range(0, max(1, len(others)), engines_at_once):
        yield [plain, *others[first : first + engines_at_once]]


def measure(
    methods: list[Method],
    prompts: list[Prompt],
    engine_args: dict[str, Any],
    file: RoundsFile,
    *,
    new_tokens: int,
    temperature: float,
    engines_at_once: int,
    profiles: bool = True,
) -> None:
    """Runs what the file does not have yet.

    The first prompt of each task and length is also profiled, after it is measured.
    Within a group all engines are alive, and take turns on each prompt, another one
    first each time; each speed-up is of two runs of the same turn.
    """
    from tqdm import tqdm

    done = {_key(each["group"], each) for each in file.read()}
    groups = list(groups_of(methods, engines_at_once))
    missing = [
        [p for p in prompts if _key(_names(group), asdict(p)) not in done]
        for group in groups
    ]
    total = sum(len(g) * len(p) for g, p in zip(groups, missing, strict=True))
    with tqdm(total=total, unit="run") as progress:
        for group, left in zip(groups, missing, strict=True):
            if left:
                sampling = {
                    "temperature": temperature,
                    "max_tokens": new_tokens,
                    "ignore_eos": True,
                    "seed": 0 if temperature else None,
                }
                _measure_group(
                    group, left, engine_args, sampling, file, progress, profiles
                )


def _measure_group(
    group: list[Method],
    prompts: list[Prompt],
    engine_args: dict[str, Any],
    sampling: dict[str, Any],
    file: RoundsFile,
    progress: Any,
    is_profiled: bool,
) -> None:
    names = _names(group)
    with ExitStack() as stack:
        engines = _start(group, engine_args, stack, progress.set_description)
        warm: set[int] = set()
        order = list(group)
        for prompt in prompts:
            progress.set_description(f"{prompt.task}, {prompt.context_tokens} tokens")
            if prompt.context_tokens not in warm:
                warm.add(prompt.context_tokens)
                for method in group:
                    engines[method.name].generate(
                        prompt.token_ids,
                        {**sampling, "max_tokens": WARM_UP_TOKENS},
                    )
            runs = {}
            for method in order:
                time.sleep(PAUSE_SECONDS)
                run = engines[method.name].generate(prompt.token_ids, sampling)
                runs[method.name] = asdict(run)
                progress.update()
            order.append(order.pop(0))
            profiles = {}
            if is_profiled and prompt.index == 0:
                for method in group:
                    profiles[method.name] = engines[method.name].profile(
                        prompt.token_ids, sampling
                    )
            place = asdict(prompt)
            del place["token_ids"]
            file.append(
                {
                    **place,
                    "group": names,
                    "runs": runs,
                    "profiles": profiles,
                    "engines": {n: each.describe() for n, each in engines.items()},
                }
            )


def _start(
    group: list[Method],
    engine_args: dict[str, Any],
    stack: ExitStack,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The engine of each method, by its name."""
    from vllm_budgetdraft.vllm_integration.engine_process import EngineProcess

    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    engines: dict[str, Any] = {}
    for method in group:
        tell(f"starting {method.name}")
        arguments = {**SHARED_ENGINE_ARGS, **engine_args, **method.engine_args}
        log = logs / f"{len(engines)}.log"
        engine = EngineProcess(arguments, log, method.environment)
        engines[method.name] = stack.enter_context(engine)
    return engines


def _names(group: list[Method]) -> list[str]:
    return [method.name for method in group]


def _key(names: list[str], place: dict[str, Any]) -> tuple[Any, ...]:
    return (*names, place["task"], place["context_tokens"], place["index"])
