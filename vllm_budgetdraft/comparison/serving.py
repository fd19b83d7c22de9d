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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_budgetdraft.comparison.measure import SHARED_ENGINE_ARGS, RoundsFile
from vllm_budgetdraft.comparison.methods import PLAIN, Method
from vllm_budgetdraft.errors import BudgetDraftError

START_SECONDS = 900
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
    prompts: list[str],
    engine_args: dict[str, Any],
    folder: Path,
    *,
    concurrencies: list[int],
    repeats: int,
    new_tokens: int,
    temperature: float,
) -> list[dict[str, Any]]:
    """Medians over repeats, for each method and concurrency, with the keys of vLLM.

    One server at a time, another one first in each repeat; at each concurrency twice as
    many requests as fit, or all prompts if these are more. It goes on where it stopped.

    Args:
        folder: for what was measured, and the servers' logs.
    """
    file = RoundsFile(folder / "serving.jsonl")
    done = {(e["method"], e["max_concurrency"], e["repeat"]) for e in file.read()}
    dataset = folder / "serving-prompts.jsonl"
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    dataset.write_text("".join(lines), encoding="utf-8")
    load = {
        "--model": engine_args["model"],
        "--dataset-name": "custom",
        "--dataset-path": str(dataset),
        "--custom-output-len": new_tokens,
        "--temperature": temperature,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--result-dir": str(folder),
        "--result-filename": "serving-result.json",
    }
    for repeat in range(repeats):
        first = repeat % len(methods)
        for method in methods[first:] + methods[:first]:
            missing = [
                each
                for each in concurrencies
                if (method.name, each, repeat) not in done
            ]
            if not missing:
                continue
            shared = {**SHARED_ENGINE_ARGS, "max_num_seqs": max(concurrencies)}
            own = {**shared, **engine_args, **method.engine_args}
            log = folder / "server.log"
            with _server(own, log, method.environment) as url:
                for concurrency in missing:
                    requests = max(len(prompts), 2 * concurrency)
                    given = {
                        **load,
                        "--base-url": url,
                        "--max-concurrency": concurrency,
                        "--num-prompts": requests,
                        "--num-warmups": min(concurrency, len(prompts)),
                    }
                    result = _bench(given)
                    if result["completed"] != requests:
                        raise BudgetDraftError(
                            f"{method.name} answered {result['completed']} of "
                            f"{requests} requests; see {log}"
                        )
                    file.append(
                        {
                            "method": method.name,
                            "max_concurrency": concurrency,
                            "repeat": repeat,
                            **{key: result[key] for key in KEYS},
                        }
                    )
    return summarise_serving(methods, file.read())


def summarise_serving(
    methods: list[Method], measured: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows by method and concurrency; ``speedup`` is of the output throughput."""
    rows = []
    plain: dict[int, float] = {}
    for method in methods:
        mine = [each for each in measured if each["method"] == method.name]
        for concurrency in sorted({each["max_concurrency"] for each in mine}):
            some = [e for e in mine if e["max_concurrency"] == concurrency]
            medians = {key: statistics.median(e[key] for e in some) for key in KEYS}
            if method.name == PLAIN:
                plain[concurrency] = medians["output_throughput"]
            rows.append(
                {
                    "method": method.name,
                    "kind": method.kind,
                    "kv_budget": method.kv_budget or None,
                    "eviction_policy": method.eviction_policy or None,
                    "num_speculative_tokens": method.num_speculative_tokens or None,
                    "max_concurrency": concurrency,
                    "num_runs": len(some),
                    "speedup": medians["output_throughput"] / plain[concurrency],
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


def _bench(given: dict[str, Any]) -> dict[str, Any]:
    command = [*VLLM, "bench", "serve", "--backend", "openai", "--save-result"]
    command += [
        "--ignore-eos",
        "--disable-tqdm",
        "--disable-shuffle",
        "--skip-chat-template",
    ]
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
