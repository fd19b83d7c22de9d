"""Where tensors live, and which implementation of the operations runs there."""

import importlib.util
import os
from types import ModuleType

import torch

from budgetdraft_kernels import reference
from vllm_budgetdraft.errors import ConfigurationError

#: Types of devices that are taken for GPUs. Tests add "cpu", to go where GPUs go.
GPU_TYPES = {"cuda"}


def is_gpu(device: torch.device) -> bool:
    """Whether work on a device is queued, and takes graphs, events and pinned copies.

    Whatever is done on GPUs alone asks this, so that a machine without one can try it.
    """
    return device.type in GPU_TYPES


def default_device() -> torch.device:
    """A GPU where PyTorch has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def select_operations(attention_backend: str, device: torch.device) -> ModuleType:
    """What ``attention_backend`` means on a device.

    Returns:
        ``budgetdraft_kernels.fused`` or ``budgetdraft_kernels.reference``.

    Raises:
        ConfigurationError: "triton" where it cannot run.
    """
    installed = importlib.util.find_spec("triton") is not None
    if attention_backend == "auto":
        attention_backend = "triton" if installed and is_gpu(device) else "torch"
    if attention_backend == "torch":
        return reference
    # Triton's interpreter runs kernels on a CPU, slowly, for tests.
    if not installed or not (is_gpu(device) or _interprets()):
        raise ConfigurationError(
            "attention_backend='triton' needs a GPU and the package triton; the device "
            f"is {device.type!r} and triton is {'' if installed else 'not '}installed; "
            "use 'auto' or 'torch'"
        )
    # Only now: Triton may be absent, and takes a while to import.
    from budgetdraft_kernels import fused

    return fused


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
