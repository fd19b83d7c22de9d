"""Files and folders that commands write: whole, and by one run at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.disks import small_files
from tests.support.engines import DRAFTER, TARGET
from tests.support.training_runs import run_options, write_inputs
from vllm_budgetdraft.cli import main
from vllm_budgetdraft.command_line import told, when_interrupted, with_homes
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.files import LOCK, claimed, read_object, whole_folder, write_text
from vllm_budgetdraft.generation.parts import write_part

#: Holds a folder until it is told to end; with a child, who outlives it.
HOLDER = """
import os, sys
from pathlib import Path
from vllm_budgetdraft.files import claimed
with claimed(Path(sys.argv[1])):
    if os.fork() == 0:
        os.close(1)
        os.execvp("sleep", ["sleep", "60"]) if sys.argv[2] == "exec" else None
        import time
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["exec", "fork"])
def holder(request, tmp_path):
    """A process that has ``tmp_path / "out"``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out"), request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_two_runs_do_not_share_a_folder(command, holder, tmp_path, capsys):
    """And one that was killed is no obstacle, whatever became of its children."""
    output = str(tmp_path / "out")
    words = {
        "train": run_options(write_inputs(tmp_path), tmp_path / "out", 1),
        "generate": ["--target", TARGET, "--texts", "nowhere", "--output", output],
        "evaluate": ["--target", TARGET, "--drafter", DRAFTER, "--output", output],
    }[command]
    with pytest.raises(SystemExit) as stop:
        main([command, *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"{output} is being written to by process {holder.pid}; wait" in said
    holder.kill()
    holder.wait()
    with claimed(tmp_path / "out"):
        owner = (tmp_path / "out" / LOCK).read_text()
    assert owner == f"{os.getpid()}\n"


def test_a_folder_that_was_claimed_keeps_what_was_written(tmp_path):
    with claimed(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with claimed(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    with claimed(tmp_path / "new"):
        pass
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["file"]


def test_where_nothing_can_be_locked_a_run_goes_on(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with claimed(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert "cannot be locked" in caplog.text


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    folder = tmp_path / "in" / "folder"
    with whole_folder(folder) as made:
        write_text(made / "a", "1")
        write_text(made / "b", "1")
        assert list(folder.glob("?")) == []
    with pytest.raises(KeyError), whole_folder(folder) as made:
        write_text(made / "a", "2")
        raise KeyError
    with pytest.raises(ConfigurationError), whole_folder(folder) as made:
        write_text(made / "a", "2")
        with small_files(1024):
            write_text(made / "b", "2" * 2000)
    assert {each.name: each.read_text() for each in folder.iterdir()} == {
        "a": "1",
        "b": "1",
    }


def test_a_full_disk_leaves_no_torn_part(tmp_path):
    """Of ``generate``, by a limit that the system keeps."""
    path = tmp_path / "part-00000.parquet"
    rows = [{"prompt": [*range(5000)], "continuation": [1], "temperature": 0.0}]
    message = "part-00000.parquet cannot be written to"
    with small_files(1024), pytest.raises(ConfigurationError, match=message):
        write_part(path, rows, 0)
    assert not path.exists()
    write_part(path, rows, 0)
    assert path.is_file()


def test_joining_leaves_a_drafter_as_it_was_where_a_disk_is_full(
    tmp_path, monkeypatch, capsys
):
    def save(drafter, folder, **_):
        (folder / "config.json").write_text("{}")
        with small_files(1024):
            (folder / "model.safetensors").write_bytes(bytes(2000))

    from vllm_budgetdraft.drafter import checkpoint

    layers = tmp_path / "layers"
    checkpoint.save_drafter(
        checkpoint.load_drafter(DRAFTER, max_positions=1),
        layers,
        tokenizer_from=DRAFTER,
    )
    checkpoint.keep_layers_alone(layers)
    monkeypatch.setattr(checkpoint, "save_drafter", save)
    monkeypatch.setattr(checkpoint, "embeddings_of", lambda _: {})
    monkeypatch.setattr(checkpoint, "load_drafter", lambda *_, **__: None)
    monkeypatch.setattr(
        "vllm_budgetdraft.drafter.join.of_target",
        lambda *_, **__: type("Model", (), {"config": _config(layers)}),
    )
    words = ["--target", TARGET, "--layers", str(layers)]
    output = tmp_path / "joined"
    output.mkdir()
    (output / "config.json").write_text("before")
    with pytest.raises(SystemExit) as stop:
        main(["join", *words, "--output", str(output)])
    assert stop.value.code == 2
    assert "File too large" in capsys.readouterr().err
    assert [each.read_text() for each in output.iterdir()] == ["before"]


def _config(folder: Path) -> object:
    from vllm_budgetdraft.drafter.configuration import read_drafter_config

    return read_drafter_config(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b'{"a": 1', b"[" * 9**5])
def test_what_is_no_object_is_refused(text, tmp_path):
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(ConfigurationError, match=r"run\.json is no JSON object"):
        read_object(tmp_path / "run.json")


def test_what_the_system_refuses_is_told_with_a_remedy(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop, told("budgetdraft"):
        (tmp_path / "nowhere").read_bytes()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "nowhere'; see to that file or folder, its permissions and the" in said
    with pytest.raises(ZeroDivisionError), told("budgetdraft"):
        _ = 1 / 0


def test_an_interruption_ends_with_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as stop, told("budgetdraft"):
        with when_interrupted(lambda: "the rest is there"):
            raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "budgetdraft: interrupted; the rest is there\n"
    with pytest.raises(SystemExit), told("budgetdraft"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "budgetdraft: interrupted\n"


def test_only_paths_begin_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["~/a", "--output=~/a", "books=~/a", "~", "a~", "--x=a~", '{"a": "~/a"}']
    assert with_homes(words) == [
        *("/home/me/a", "--output=/home/me/a", "books=/home/me/a", "/home/me"),
        *words[4:],
    ]
