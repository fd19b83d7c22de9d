"""Every method on the same prompts, in turns; what it finds goes to a file at once."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_budgetdraft.comparison.engines import groups_that_fit, needed_bytes, running
from vllm_budgetdraft.comparison.methods import PLAIN, Method
from vllm_budgetdraft.comparison.races import describe, races_of
from vllm_budgetdraft.comparison.room import memory_at_hand

if TYPE_CHECKING:  # its import takes seconds, in which engines can start
    from vllm_budgetdraft.comparison.prompts import Prompt

#: OpenMP keeps threads waiting actively for 0.2 s after an engine's last operation, at
#: the cost of the engine whose turn comes next.
PAUSE_SECONDS = 0.5
WARM_UP_TOKENS = 16

#: A prompt at a temperature, and the methods to run on it.
Round = tuple["Prompt", float, list[str]]

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
    # On a GPU vLLM's attention in float32 would round to TF32, each kernel in its way,
    # so that outputs differed though nothing is wrong.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
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


def measure(
    methods: list[Method],
    prompts: list["Prompt"],
    engine_args: dict[str, Any],
    file: RoundsFile,
    *,
    new_tokens: int,
    temperatures: Sequence[float],
    engines_at_once: int,
    profiles: bool = True,
    ignore_eos: bool = True,
) -> None:
    """Makes the runs that the file lacks: each method, prompt and temperature.

    The first prompt of each task and length is also profiled, after it is measured.
    Requests have no seed, with which this project's drafts would be greedy (see
    ``sampling.draft_sampling``).
    Within a group all engines are alive, and take turns on each prompt; each speed-up
    is of two runs of the same turn, so that every round has plain vLLM. A group is
    smaller than asked for where there is no room for its engines at that moment.

    Raises:
        ConfigurationError: there is no room for two.
        BudgetDraftError: an engine did not start.
    """
    from tqdm import tqdm

    engine_args = {**SHARED_ENGINE_ARGS, **engine_args}
    memory = memory_at_hand()
    done = {
        (name, each["task"], each["context_tokens"], each["index"], each["temperature"])
        for each in file.read()
        for name in each["runs"]
    }
    places = [(prompt, each) for each in temperatures for prompt in prompts]
    plain, *others = methods
    methods = [plain, *(each for each in others if _left([each], places, done))]
    needs = needed_bytes(methods, engine_args, memory)
    groups = groups_that_fit(methods, needs, memory.free_bytes, engines_at_once)
    if len(groups[0]) < min(len(methods), 1 + engines_at_once):
        _tell(f"there is room for {len(groups[0])} engines at once")
    rounds = [_left(group, places, done) for group in groups]
    total = sum(len(names) for each in rounds for *_, names in each)
    sampling = {"max_tokens": new_tokens, "ignore_eos": ignore_eos}
    with tqdm(total=total, unit="run") as progress:
        for group, left in zip(groups, rounds, strict=True):
            if left:
                progress.set_description(f"starting {len(group)} engines")
                is_cpu = memory.device == "cpu"
                with running(group, engine_args, memory, _tell) as engines:
                    _measure_group(
                        engines, left, sampling, file, progress, profiles, is_cpu
                    )


def _left(
    group: list[Method],
    places: list[tuple["Prompt", float]],
    done: set[tuple[str, str, int, int, float]],
) -> list[Round]:
    """Places that a method lacks, each with the methods that lack it and plain vLLM."""
    found = []
    for prompt, temperature in places:
        place = prompt.task, prompt.context_tokens, prompt.index, temperature
        names = [each.name for each in group if (each.name, *place) not in done]
        if names:
            found.append((prompt, temperature, list(dict.fromkeys([PLAIN, *names]))))
    return found


def _tell(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _measure_group(
    engines: dict[str, Any],
    rounds: list[Round],
    sampling: dict[str, Any],
    file: RoundsFile,
    progress: Any,
    profiles: bool,
    is_cpu: bool,
) -> None:
    warm: set[tuple[int, float]] = set()
    for turn, (prompt, temperature, names) in enumerate(rounds):
        progress.set_description(f"{prompt.task}, {len(prompt.token_ids)} tokens")
        sampling = {**sampling, "temperature": temperature}
        # On a CPU nothing is compiled or tuned for a length.
        kind = 0 if is_cpu else prompt.context_tokens, temperature
        if kind not in warm:
            warm.add(kind)
            warm_up(engines, prompt, sampling)
        is_profiled = profiles and prompt.index == 0
        some = {name: engines[name] for name in names}
        found = a_round(some, prompt, turn, sampling, is_profiled=is_profiled)
        for name, race in found["races"].items():
            _tell(f"{name}, {prompt.task} {prompt.index}: {describe(race)}")
        file.append(found)
        progress.update(len(names))


def warm_up(
    engines: dict[str, Any], prompt: "Prompt", sampling: dict[str, Any]
) -> None:
    """A few tokens of each engine, which are not measured."""
    for engine in engines.values():
        engine.generate(prompt.token_ids, {**sampling, "max_tokens": WARM_UP_TOKENS})


def take_turns(
    engines: dict[str, Any], turn: int, ask: Callable[[Any], Any]
) -> dict[str, Any]:
    """One run of each engine, by name; in every turn another one is first."""
    names = list(engines)
    first = turn % len(names)
    runs = {}
    for name in names[first:] + names[:first]:
        time.sleep(PAUSE_SECONDS)
        runs[name] = ask(engines[name])
    return {name: runs[name] for name in names}


def a_round(
    engines: dict[str, Any],
    prompt: "Prompt",
    turn: int,
    sampling: dict[str, Any],
    *,
    is_profiled: bool = False,
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One prompt's run of each engine, as plain data.

    Args:
        turn: see ``take_turns``.
        earlier: round of this prompt by engines that are gone, to be one with this.
    """
    tokens = prompt.token_ids
    runs = take_turns(engines, turn, lambda each: each.generate(tokens, sampling))
    found: dict[str, Any] = {
        "group": list(engines),
        "runs": {name: asdict(run) for name, run in runs.items()},
        "profiles": {
            name: engine.profile(tokens, sampling)
            for name, engine in engines.items()
            if is_profiled
        },
        "engines": {name: engine.describe() for name, engine in engines.items()},
    }
    if earlier:
        found |= {key: {**earlier[key], **found[key]} for key in ("runs", "engines")}
    found["races"] = {}
    if PLAIN in engines and not sampling["temperature"]:
        outputs = {name: run["token_ids"] for name, run in found["runs"].items()}
        dtype = found["engines"][PLAIN]["dtype"]
        found["races"] = races_of(engines[PLAIN], dtype, tokens, outputs)
    place = asdict(prompt)
    del place["token_ids"]
    return {
        **place,
        "prompt_tokens": len(tokens),
        "temperature": sampling["temperature"],
        **found,
    }
