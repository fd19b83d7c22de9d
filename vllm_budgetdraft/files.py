"""What commands write: whole or not at all, in a folder of one run at a time."""

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from vllm_budgetdraft.errors import ConfigurationError

LOCK = ".budgetdraft.lock"
#: Where what comes with the repository lies, as seen from the working directory.
MODELS = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "models"))

logger = logging.getLogger(__name__)


def read_text(path: Path) -> str:
    """Raises ConfigurationError where it is not UTF-8, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}); give a text in UTF-8"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Raises ConfigurationError where it is no JSON object."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(
            f"{path} is no JSON object as this command writes it: it was cut short, "
            "or is of another program; move it away, or name another folder"
        )
    return found


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is complete or not there.

    Raises:
        ConfigurationError: it cannot be written.
    """
    unfinished = path.with_suffix(".unfinished")
    with _writable(path):
        write(unfinished)
        unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """Of a file that is complete or not there."""
    replace(path, partial(Path.write_text, data=text, encoding="utf-8"))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files take their place in the end, or never do.

    What else ``folder`` holds stays.

    Raises:
        ConfigurationError: it cannot be made.
    """
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Within it, for it may be a file system of its own.
        made = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder)
    with made as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir()):
            file.replace(folder / file.name)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes a folder that this process alone writes to, until it ends or dies.

    Where nothing was written to a new one, it goes.

    Raises:
        ConfigurationError: it cannot be written to, or another process has it.
    """
    with _writable(folder):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_lock(folder / LOCK)
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
                if is_new:
                    folder.rmdir()


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written to ({error.strerror or error}); name another "
            "folder, or see to its permissions and the disk"
        ) from error


def _open_lock(path: Path) -> TextIO:
    """Locked by this process, not its children: it is free when this one has died."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read(20).strip()
            file.close()
            raise ConfigurationError(
                f"{path.parent} is being written to by process {owner}; wait until "
                "that has ended, or name another folder"
            ) from error
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no other run writes there",
                path.parent,
                error,
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # of a run that ended meanwhile, and took it away
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
