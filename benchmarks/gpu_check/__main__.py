"""Whether this package does on this machine's GPU what it promises, in six minutes.

    python -m benchmarks.gpu_check
    python -m benchmarks.gpu_check --minutes 15

Kernels are tested against their definitions; engines of every model runner that this
vLLM has generate what plain vLLM does; then drafts and attention are timed. Prints a
table, and writes it as JSON, with logs beside it. The exit status is 0 only if all
held, 1 if not, and 2 where there is no GPU. Takes 24 GiB of GPU memory; a machine of
few cores needs more minutes.

``--tiny`` runs all of it in small on a CPU, which shows that it works and nothing else.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu_check import stages
from benchmarks.gpu_check.rows import (
    SKIPPED,
    CheckFailedError,
    Row,
    all_hold,
    as_table,
    row_of,
)
from benchmarks.gpu_check.stages import Part

#: Of the whole, without ``--minutes``.
MINUTES = 6.0


def main(argv: list[str] | None = None) -> int:
    """Exit status."""
    args = _parser().parse_args(argv)
    import torch

    from vllm_budgetdraft import provenance
    from vllm_budgetdraft.diagnosis import env

    is_gpu, found = torch.cuda.is_available(), env.collect()
    if not is_gpu and not args.tiny:
        print(
            f"gpu-check: it needs a GPU, and the GPU here is: {found['gpu']} (torch "
            f"{torch.__version__}); run it on a machine with an NVIDIA GPU, or add "
            "--tiny to try the check itself on a CPU",
            file=sys.stderr,
        )
        return 2
    if is_gpu:  # Triton compiles, whoever set this for tests
        os.environ["TRITON_INTERPRET"] = "0"
    args.output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    rows = [row_of("environment", lambda: _usable(found))]
    runners = args.runners or runners_of(found)
    if "V2" not in runners:
        rows.append(Row("V2", SKIPPED, _why_no_v2(found), 0.0))
    together = [stages.kernels(args)]
    together += [
        stages.engines(runner, args, has_half=runner == runners[-1])
        for runner in runners
    ]
    alone = [stages.draft_steps(args), stages.attention(args)]
    rows += run_all(together, alone, args.minutes)
    document = {
        "holds": all_hold(rows),
        "seconds": round(time.monotonic() - begun, 1),
        "rows": [asdict(row) for row in rows],
        "environment": found,
        "provenance": provenance.collect(vars(args) | {"output": str(args.output)}),
    }
    file = args.output / "gpu-check.json"
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\n{env.as_lines(found)}\n\n{as_table(rows)}\n\n{file}")
    return 0 if document["holds"] else 1


def run_all(together: list[Part], alone: list[Part], minutes: float) -> list[Row]:
    """Rows of parts that share the GPU, then of those that are timed on it."""
    deadline = time.monotonic() + 60 * minutes
    rows: list[Row] = []

    def run(part: Part) -> list[Row]:
        seconds = 60 * part.stage.minutes * minutes / MINUTES
        print(f"gpu-check: {part.stage.name}, at most {seconds:.0f} s", flush=True)
        return stages.run(part, min(seconds, deadline - time.monotonic()))

    with ThreadPoolExecutor(len(together)) as threads:
        for found in threads.map(run, together):
            rows += found
    for part in alone:
        rows += run(part)
    return rows


def runners_of(found: dict[str, str]) -> list[str]:
    """Model runners of the installed vLLM in which drafting works, the newest last."""
    from vllm_budgetdraft.vllm_integration.compatibility import supports_runner_v2

    return ["V1", "V2"] if supports_runner_v2(found["vllm"]) else ["V1"]


def _usable(found: dict[str, str]) -> str:
    """What runs here.

    Raises:
        CheckFailedError: vLLM is not supported, or does not load this package.
    """
    for name, sign in (("vllm", ", supported"), ("plugin", "is loaded")):
        if sign not in found[name]:
            raise CheckFailedError(f"{name}: {found[name]}")
    return f"vLLM {found['vllm'].partition(',')[0]}, torch {found['torch']}"


def _why_no_v2(found: dict[str, str]) -> str:
    if "V2" in runners_of(found):
        return "--runners leaves it out"
    version = found["vllm"].partition(",")[0]
    return f"vLLM {version} takes no drafter of ours in model runner V2"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/gpu-check"), help="folder"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="after which all has ended"
    )
    parser.add_argument(
        "--runners", nargs="+", choices=("V1", "V2"), help="if not all there are"
    )
    parser.add_argument("--tiny", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
