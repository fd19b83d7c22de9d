"""Methods behind ``vllm serve``, under the load of ``vllm bench serve``."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_budgetdraft.comparison.measure import SHARED_ENGINE_ARGS, RoundsFile
from vllm_budgetdraft.comparison.methods import PLAIN, Method
from vllm_budgetdraft.errors import BudgetDraftError

START_SECONDS = 900
#: What rows are told apart by, beside the method.
PLACE = ("task", "context_tokens", "temperature", "max_concurrency")
#: What is kept of a result of ``vllm bench serve``, by its own names.
KEYS = (
    *("completed", "duration", "request_throughput", "output_throughput"),
    *(
        f"{statistic}_{latency}_ms"
        for latency in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("mean", "median", "p99")
    ),
)
# Not the script "vllm", which a copied environment may not have.
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


def measure_serving(
    methods: list[Method],
    prompts: dict[tuple[str, int], list[str]],
    engine_args: dict[str, Any],
    folder: Path,
    *,
    concurrencies: list[int],
    repeats: int,
    new_tokens: int,
    temperatures: Sequence[float],
    ignore_eos: bool,
) -> list[dict[str, Any]]:
    """Medians over repeats, for each method, place and concurrency, with vLLM's keys.

    One server at a time, another one first in each repeat; at each concurrency twice as
    many requests as fit, or all prompts if these are more. It goes on where it stopped.

    Args:
        prompts: texts by task and context, with what a tokenizer would put before them.
        folder: for what was measured, and the servers' logs.
    """
    file = RoundsFile(folder / "serving.jsonl")
    done = {
        (e["method"], e["repeat"], *(e[name] for name in PLACE)) for e in file.read()
    }
    # Requests of a server are as those of the other engines: with no seed, no top_p of
    # the model's generation_config.json, and nothing before the prompt.
    own_sampling = {"generation_config": "vllm"}
    load = {
        "--model": engine_args["model"],
        "--dataset-name": "custom",
        "--custom-output-len": new_tokens,
        "--extra-body": {"add_special_tokens": False},
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--result-dir": str(folder),
        "--result-filename": "serving-result.json",
    }
    places = [
        (*group, temperature, concurrency)
        for group in prompts
        for temperature in temperatures
        for concurrency in concurrencies
    ]
    for repeat in range(repeats):
        first = repeat % len(methods)
        for method in methods[first:] + methods[:first]:
            missing = [
                place for place in places if (method.name, repeat, *place) not in done
            ]
            if not missing:
                continue
            shared = {**SHARED_ENGINE_ARGS, "max_num_seqs": max(concurrencies)}
            own = {**shared, **own_sampling, **engine_args, **method.engine_args}
            log = folder / "server.log"
            with _server(own, log, method.environment) as url:
                for task, context, temperature, concurrency in missing:
                    texts = prompts[task, context]
                    requests = max(len(texts), 2 * concurrency)
                    given = {
                        **load,
                        "--dataset-path": _dataset(texts, folder),
                        "--temperature": temperature,
                        "--base-url": url,
                        "--max-concurrency": concurrency,
                        "--num-prompts": requests,
                        "--num-warmups": min(concurrency, len(texts)),
                    }
                    result = _bench(given, ignore_eos)
                    if result["completed"] != requests:
                        raise BudgetDraftError(
                            f"{method.name} answered {result['completed']} of "
                            f"{requests} requests; see {log}"
                        )
                    place = (task, context, temperature, concurrency)
                    file.append(
                        {
                            "method": method.name,
                            **dict(zip(PLACE, place, strict=True)),
                            "repeat": repeat,
                            **{key: result[key] for key in KEYS},
                        }
                    )
    return summarise_serving(methods, file.read())


def _dataset(texts: list[str], folder: Path) -> str:
    """File that ``vllm bench serve`` reads."""
    path = folder / "serving-prompts.jsonl"
    lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def summarise_serving(
    methods: list[Method], measured: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows by method and ``PLACE``; ``speedup`` is of the output throughput."""
    rows = []
    plain: dict[tuple[Any, ...], float] = {}
    for method in methods:
        mine: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for each in measured:
            if each["method"] == method.name:
                mine.setdefault(tuple(each[name] for name in PLACE), []).append(each)
        for place, some in sorted(mine.items(), key=lambda item: item[0]):
            medians = {key: statistics.median(e[key] for e in some) for key in KEYS}
            if method.name == PLAIN:
                plain[place] = medians["output_throughput"]
            at = dict(zip(PLACE, place, strict=True))
            rows.append(
                {
                    "method": method.name,
                    "kind": method.kind,
                    "kv_budget": method.kv_budget or None,
                    "eviction_policy": method.eviction_policy or None,
                    "num_speculative_tokens": method.num_speculative_tokens or None,
                    **at,
                    "drafts": method.drafts_at(at["temperature"]),
                    "num_runs": len(some),
                    "speedup": medians["output_throughput"] / plain[place],
                    **medians,
                }
            )
    return rows


def flags(arguments: dict[str, Any]) -> list[str]:
    """Of vLLM's command line, from arguments of its ``LLM``."""
    found = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            found += [f"--{flag}", text]
    return found


@contextmanager
def _server(
    engine_args: dict[str, Any], log: Path, environment: dict[str, str]
) -> Iterator[str]:
    """Its address, while it is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = dict(engine_args)
    command = [*VLLM, "serve", arguments.pop("model"), *flags(arguments)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        # A session of its own, so that no child outlives it.
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_up(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise BudgetDraftError(
                    f"the server of {command[3:]} did not start; its log is {log}, "
                    f"and ends:\n{log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            status: int = answer.status
            return status == 200
    except (urllib.error.URLError, OSError):
        return False


def _bench(given: dict[str, Any], ignore_eos: bool) -> dict[str, Any]:
    command = [*VLLM, "bench", "serve", "--backend", "openai", "--save-result"]
    command += ["--disable-tqdm", "--disable-shuffle"]
    command += ["--skip-chat-template"]  # the prompts are in it already
    command += ["--ignore-eos"] if ignore_eos else []
    for flag, value in given.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        command += [flag, text]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BudgetDraftError(
            f"vllm bench serve failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        )
    path = Path(given["--result-dir"]) / given["--result-filename"]
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return result
