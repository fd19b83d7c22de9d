"""The quick start, done as its page says."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.command_lines import commands
from tests.support.engines import wait_until
from tests.support.pages import DOCS, ROOT, Block, code_blocks
from tests.support.servers import Server

pytestmark = pytest.mark.vllm

PAGE = DOCS / "quick-start.md"
#: What sets an environment up, and what a reader gives to a shell.
SET_UP = {"make", ".", "pip", "export"}
ENVIRONMENT = {
    # One process starts sooner than two. The page's server has two all the same.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Beside its log, which is on the same channel, nothing is printed but the text.
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The package of this checkout, in the script's own folder or another.
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def programs(block: Block) -> list[str]:
    if block.language != "bash":
        return []
    return [words[0] for words in commands(block.text)]


def run(*command: str) -> str:
    """What a command prints, which must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@contextmanager
def served(block: Block, folder: Path) -> Iterator[Server]:
    """The server of a block, on a port that is free, until the context ends."""
    ((_, *words),) = commands(block.text)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            # Not the script "vllm", which in a copied .venv is that of the original.
            [*(sys.executable, "-m", "vllm.entrypoints.cli.main"), *words]
            + ["--port", str(port)],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Server(f"http://localhost:{port}", process, log)
    try:
        assert wait_until(server.is_up, seconds=300), log.read_text()[-3000:]
        yield server
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def test_the_page_does_what_it_says(tmp_path):
    blocks = [b for b in code_blocks(PAGE) if not SET_UP.intersection(programs(b))]
    # Offline first, then the server, then what asks it.
    place = next(i for i, block in enumerate(blocks) if "vllm" in programs(block))
    script, expected = blocks[:place]
    assert (script.language, expected.language) == ("python", "text")
    file = tmp_path / "generate.py"
    file.write_text(script.text)
    printed = run(sys.executable, str(file))
    text, _, length = printed.partition("\nacceptance length: ")
    # The whole of it may depend on the processor, as rounding does.
    assert text.split()[:5] == expected.text.split()[:5]
    assert 1 < float(length.split()[0]) <= 9

    with served(blocks[place], tmp_path) as server:
        answers, metrics = [], ""
        for block in blocks[place + 1 :]:
            asked = block.text.replace("http://localhost:8000", server.url)
            if block.language == "python":
                answers.append(run(sys.executable, "-c", asked).removesuffix("\n"))
            elif "/metrics" in asked:
                metrics += run("bash", "-c", asked)
            else:
                reply = json.loads(run("bash", "-c", asked))
                answers.append(reply["choices"][0]["text"])
    assert answers == [text] * 3
    assert "vllm:spec_decode_num_accepted_tokens_total" in metrics
    assert "vllm_budgetdraft:" in metrics
