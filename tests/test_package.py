"""What is released: complete, and at work where nothing but it is installed."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import vllm_budgetdraft

ROOT = Path(__file__).parents[1]
#: Of a checkout, what no build needs: environments, builds, caches, outputs.
IGNORED = (".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "site")
IN_SDIST = {
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "README.md",
    "kernels",
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
    "vllm_budgetdraft",
    "vllm_budgetdraft.egg-info",
}
#: A folder of ``budgetdraft evaluate``.
PAPER = ROOT / "benchmarks/results/paper-2-cores"


class Build(NamedTuple):
    source: Path
    sdist: Path
    wheel_of_sdist: Path
    wheel_of_source: Path


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True
    )


def output(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Of a copy: setuptools packs whatever an earlier build left in a checkout."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*IGNORED))
    # Isolated, each build would download setuptools anew.
    command = (sys.executable, "-m", "build", "--no-isolation", source)
    output(*command, "--outdir", folder / "both", cwd=folder)
    output(*command, "--outdir", folder / "wheel", "--wheel", cwd=folder)
    (sdist,) = (folder / "both").glob("*.tar.gz")
    wheels = [next((folder / name).glob("*.whl")) for name in ("both", "wheel")]
    return Build(source, sdist, *wheels)


@pytest.fixture(scope="module")
def bin_folder(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a new environment with the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    # This environment's pip installs into that one: a pip of its own takes seconds.
    output(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    output(*pip, "install", "--quiet", build.wheel_of_sdist, cwd=folder)
    return folder / "bin"


def checksums(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


def test_the_wheel_is_the_two_packages_and_nothing_else(build: Build) -> None:
    packages = ("vllm_budgetdraft", "kernels/budgetdraft_kernels")
    expected = {
        path.relative_to((build.source / package).parent).as_posix()
        for package in packages
        for path in (build.source / package).rglob("*")
        if path.is_file()
    }
    files = checksums(build.wheel_of_sdist)
    assert {name for name in files if ".dist-info/" not in name} == expected


def test_the_sdist_builds_the_wheel_that_the_checkout_does(build: Build) -> None:
    assert checksums(build.wheel_of_sdist) == checksums(build.wheel_of_source)


def test_the_sdist_has_what_a_build_needs_and_nothing_else(build: Build) -> None:
    with tarfile.open(build.sdist) as archive:
        files = [Path(file.name) for file in archive if file.isfile()]
    assert {path.parts[1] for path in files} == IN_SDIST


def test_one_version_imported_from_where_it_is_installed(
    bin_folder: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib.metadata, budgetdraft_kernels, vllm_budgetdraft;"
        "print(importlib.metadata.version('vllm-budgetdraft'));"
        "print(vllm_budgetdraft.__version__);"
        "print(vllm_budgetdraft.__file__); print(budgetdraft_kernels.__file__)"
    )
    of_metadata, of_package, *files = output(
        bin_folder / "python", "-c", code, cwd=tmp_path
    ).splitlines()
    assert of_metadata == of_package == vllm_budgetdraft.__version__
    for file in map(Path, files):
        assert file.is_relative_to(bin_folder.parent)
        assert "site-packages" in file.parts


def test_no_engine_comes_with_it(bin_folder: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec;"
        "print(*filter(find_spec, ['torch', 'transformers', 'triton', 'vllm']))"
    )
    assert output(bin_folder / "python", "-c", code, cwd=tmp_path).split() == []


def test_a_speculative_config_is_parsed(bin_folder: Path, tmp_path: Path) -> None:
    code = (
        "from vllm_budgetdraft.config import parse_speculative_config as parse;"
        "print(parse({'model': 'x', 'num_speculative_tokens': 4}).kv_budget)"
    )
    assert output(bin_folder / "python", "-c", code, cwd=tmp_path) == "512\n"


def test_the_plugin_is_found_and_never_raises(bin_folder: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points;"
        "(plugin,) = entry_points(group='vllm.general_plugins');"
        "plugin.load()(); print(plugin.name)"
    )
    done = run(bin_folder / "python", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "budgetdraft\n")
    assert "the method 'budgetdraft' is not available" in done.stderr


def test_the_command_says_its_version_and_what_it_can(
    bin_folder: Path, tmp_path: Path
) -> None:
    command = bin_folder / "budgetdraft"
    version = output(command, "--version", cwd=tmp_path).strip()
    assert version == vllm_budgetdraft.__version__
    assert "demo" in output(command, "--help", cwd=tmp_path)


def test_the_command_says_what_a_bug_report_needs(
    bin_folder: Path, tmp_path: Path
) -> None:
    found = json.loads(
        output(bin_folder / "budgetdraft", "env", "--json", cwd=tmp_path)
    )
    assert found["vllm-budgetdraft"] == vllm_budgetdraft.__version__
    assert {found[name] for name in ("vllm", "torch", "triton")} == {"not installed"}
    assert found["plugin"] == "is loaded by vLLM"


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ("demo", "repository"),  # the pair is made with layers that come with it
        ("fetch smollm2", "repository"),
        ("demo --target x --drafter y", "pip install"),
        ("train --target x", "pip install"),
        ("generate --target x --texts y --output z", "pip install"),
        ("evaluate --target x --drafter y --output z", "pip install"),
        ("pad-target --target x --output z", "pip install"),
        (f"report {PAPER} --output z", "pip install"),
    ],
)
def test_a_command_that_misses_something_says_what_in_one_line(
    arguments: str, remedy: str, bin_folder: Path, tmp_path: Path
) -> None:
    done = run(bin_folder / "budgetdraft", *arguments.split(), cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("budgetdraft: ") and remedy in line
