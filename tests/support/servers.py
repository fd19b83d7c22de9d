"""``vllm serve``, as users start and stop it."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.support.engines import TARGET, wait_until


@dataclass(frozen=True)
class Server:
    """A server that is up.

    Attributes:
        url: without a path.
        log: what it has printed so far.
    """

    url: str
    process: subprocess.Popen
    log: Path

    def metrics(self) -> Counter[str]:
        """Values by name, summed over their labels; 0 where there is none."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        values: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] += sample.value
        return values

    def resident_mib(self) -> float:
        """Memory of the server and its children, shared pages counted in each."""
        server = psutil.Process(self.process.pid)
        family = [server, *server.children(recursive=True)]
        return sum(process.memory_info().rss for process in family) / 2**20

    def is_up(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=2).status == 200
        except OSError:
            return False


@contextmanager
def serve(folder: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """A server of the target, as "books" in float32, until the block ends.

    It must then exit as it should on SIGINT, and have logged no traceback before.

    Args:
        folder: for its log.
    """
    port = free_port()
    command = [
        # Not the script "vllm", which in a copied .venv is still that of the original.
        *(sys.executable, "-m", "vllm.entrypoints.cli.main"),
        *("serve", TARGET, "--served-model-name", "books"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
        "--disable-uvicorn-access-log",
        *arguments,
    ]
    log = folder / "server.log"
    with log.open("w") as output:
        # A session of its own, so that no child outlives the test.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | environment,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        assert wait_until(server.is_up, seconds=180), "the server is not up"
        yield server
        # Read before the end: vLLM's output handler may log its own engine's shutdown.
        text = log.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    except Exception as error:
        error.add_note(f"the server's log ends:\n{log.read_text()[-3000:]}")
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert "Traceback" not in text, text[-3000:]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
