"""What tests see of the machine, and fixtures shared by all of them."""

import os
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONG_FILES = {"test_device_path_v1", "test_device_path_v2"}
KERNEL_TESTS = Path(__file__).parent / "kernel_parity"

# Threads that wait for each other actively crawl where anything else runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # it has read the variable
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(name, value)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Decides between Triton's interpreter and a GPU, for all tests of this run.

    Triton does when it is first imported, which nothing before this does. Tests are
    written for CPUs, but for those of kernels.
    """
    if may_see_gpu(config) and torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if find_spec("triton") is not None:
        from tests.support import interpreter

        interpreter.mend()


def may_see_gpu(config: pytest.Config) -> bool:
    """Whether TRITON_INTERPRET=0 says so, or tests of kernels alone are run."""
    if chosen := os.environ.get("TRITON_INTERPRET"):
        return chosen == "0"
    started_in = config.invocation_params.dir
    paths = [started_in / arg.partition("::")[0] for arg in config.args]
    return all(path.resolve().is_relative_to(KERNEL_TESTS) for path in paths)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests that take minutes come first, and then those of most tests.

    Last, one process would wait for the other. Engines of tests are set up for vLLM on
    a CPU, which its build for GPUs lacks.
    """
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG_FILES, -sizes[item.path]))
    try:
        vllm = version("vllm")
    except PackageNotFoundError:
        return  # then they fail
    if "cpu" in vllm:  # by which vLLM chooses its platform, too
        return
    reason = f"needs vLLM for CPUs, and this is {vllm}; make gpu-check has engines"
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def drafter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with 3 layers and 2 KV heads."""
    from tests.support import models

    return models.write_model(tmp_path_factory.mktemp("drafter"), models.llama())


@pytest.fixture(scope="session")
def hugging_face_drafter(drafter_folder: Path) -> "PreTrainedModel":
    """The model of ``drafter_folder`` in ``transformers``."""
    from tests.support import models

    return models.read_model(drafter_folder)
