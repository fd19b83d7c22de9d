r"""Everything that only a GPU can show, in one command, for a machine without network.

    python -m benchmarks.gpu_session OUTPUT --texts 'books/train-*.jsonl.xz' \
        --held-out books/validation.jsonl.xz --minutes 25

It trains a target of 58 M parameters at 16K positions and its drafter, pads the target
to the cost of 7 B parameters, checks and times the kernels and drafts, and runs the
comparison with plain vLLM, ngram and draft_model. Each stage is a process with a bound
on its time; what a stage has done it is not asked to do again, and a stage that failed
or ran out of time does not keep others from running. Models are saved in files below 16
MiB; what training would go on from, and the padded target, which is made again in a
minute, are larger. Needs vLLM and this package's requirements on the path.

``--tiny`` runs all of it in small on a CPU, which shows that it works and nothing else.
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

DONE = "stages.json"

#: Options of stages by name, and those of a run in small.
FULL = {
    "kernels": "",
    "target": "--minutes 4",
    # Half as wide as the target.
    "drafter": "--hidden_size 320 --intermediate_size 896 --num_hidden_layers 2 "
    "--num_attention_heads 5 --num_key_value_heads 1 --max_steps 3000 "
    "--prefix_tokens 3840 15872 --bf16 true",
    "padded": "--size 7b-gqa",
    "evaluate": "--context-tokens 4096 8192 16384 --kv-budgets 512 --prompts 2 "
    "--num-speculative-tokens 8 --engines-at-once 2 --dtype bfloat16",
    "batched": "--context-tokens 16384 --batch-sizes 16 32",
}
TINY = {
    "kernels": "-k signatures",
    "target": "--minutes 0.5 --context-tokens 512 --tokens-per-step 2048 --layers 2 "
    "--hidden-size 64 --intermediate-size 128 --heads 2 --kv-heads 2",
    "drafter": "--hidden_size 64 --intermediate_size 64 --num_attention_heads 2 "
    "--num_key_value_heads 1 --max_steps 20 --prefix_tokens 128 "
    "--continuation_tokens 32 --budgets 32 64 --budget_weights 0.5 0.5 --chunk_size 8 "
    "--use_cpu true",
    "padded": "--size 150m",
    "evaluate": "--context-tokens 128 --kv-budgets 64 --prompts 1 --new-tokens 16 "
    "--num-speculative-tokens 3 --engines-at-once 3",
    "batched": "--context-tokens 128 --batch-sizes 2 --new-tokens 16 --repeats 1 "
    "--dtype float32",
}


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        minutes: after which it is ended.
        command: arguments of Python, as a shell has them.
        needs: stages without whose success it cannot run.
    """

    name: str
    minutes: float
    command: str
    needs: tuple[str, ...] = ()


def stages(args: argparse.Namespace) -> list[Stage]:
    """What is to be run, in an order in which each can be."""
    options = TINY if args.tiny else FULL
    output = shlex.quote(str(args.output))
    texts, held_out = shlex.join(args.texts), shlex.quote(args.held_out)
    # Engines that are compared share a GPU; a batch of long requests has it alone.
    shared, alone = (
        shlex.quote(json.dumps({"gpu_memory_utilization": share, **args.engine_args}))
        for share in (0.29, 0.85)
    )
    has_begun = any((args.output / "drafter").glob("checkpoint-*"))
    goes_on = "--resume_from_checkpoint true" if has_begun else ""
    models = f"--target {output}/padded --drafter {output}/drafter"
    return [
        Stage("kernels", 4, f"-m pytest -q tests/kernel_parity {options['kernels']}"),
        Stage(
            "draft_steps",
            3,
            f"-m benchmarks.draft_steps --output {output}/draft-steps.json",
        ),
        Stage(
            "attention",
            4,
            f"-m benchmarks.micro.attention_report --output {output}/attention.json",
        ),
        Stage(
            "target",
            6,
            f"-m benchmarks.train_target --texts {texts} --output {output}/target "
            f"{options['target']}",
        ),
        Stage(
            "drafter",
            6,
            f"-m vllm_budgetdraft train --target {output}/target --texts {texts} "
            f"--unwrap_lines true --objective kl {goes_on} "
            "--save_steps 500 --save_total_limit 1 --report_to none "
            f"--output_dir {output}/drafter {options['drafter']}",
            needs=("target",),
        ),
        Stage(
            "padded",
            2,
            f"-m vllm_budgetdraft pad-target --target {output}/target "
            f"--output {output}/padded {options['padded']}",
            needs=("target",),
        ),
        Stage(
            "evaluate",
            9,
            f"-m vllm_budgetdraft evaluate {models} --unwrap-lines "
            "--methods vllm ngram draft_model budgetdraft "
            f"--data books={held_out} --engine-args {shared} "
            f"--output {output}/evaluate {options['evaluate']}",
            needs=("drafter", "padded"),
        ),
        Stage(
            "batched",
            9,
            f"-m benchmarks.batched_decoding {models} --texts {held_out} "
            f"--engine-args {alone} --output {output}/batched.json "
            f"{options['batched']}",
            needs=("drafter", "padded"),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", nargs="+", required=True, help="to train on")
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of it")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="and no other")
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help="JSON, of vLLM's LLM"
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
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
        if succeeded(stage.name):
            continue
        if missing := [name for name in stage.needs if not succeeded(name)]:
            found[stage.name] = {"status": f"needs {', '.join(missing)}"}
        else:
            begun = time.monotonic()
            seconds = min(60 * stage.minutes, deadline - begun)
            found[stage.name] = {"status": _run(stage, output, seconds)}
            found[stage.name]["seconds"] = round(time.monotonic() - begun, 1)
        print(stage.name, found[stage.name], flush=True)
        file.write_text(json.dumps(found, indent=1))
    return found


def _run(stage: Stage, output: Path, seconds: float) -> str:
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
