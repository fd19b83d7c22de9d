"""The OpenAI-compatible server with BudgetDraft, as a client sees it."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engines import DRAFTER, TARGET, wait_until

pytestmark = pytest.mark.vllm

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    port = free_port()
    settings = {
        "method": "budgetdraft",
        "model": DRAFTER,
        "num_speculative_tokens": 4,
        "kv_budget": 256,
    }
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        TARGET,
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", "books"),
        *("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "4"),
        *("--enforce-eager", "--chat-template", str(template)),
        *("--speculative-config", json.dumps(settings)),
    ]
    log = folder / "server.log"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment
        )
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
        except OSError:
            return False

    try:
        assert wait_until(is_up, seconds=180), log.read_text()[-3000:]
        yield url
        # Read before the end: vLLM's output handler may log its own engine's shutdown.
        text = log.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert "BudgetDraft memory" in text
    assert "Traceback" not in text, text[-3000:]


def test_completions_and_chats_stream_and_metrics_count_them(server: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="unused")
    prompt = "It was a dark night, and the old man sat by the fire"
    request = {"model": "books", "temperature": 0.0, "max_tokens": 48}

    whole = client.completions.create(prompt=prompt, **request)
    pieces = client.completions.create(prompt=prompt, stream=True, **request)
    streamed = [piece.choices[0].text for piece in pieces]
    assert len(streamed) > 1
    assert "".join(streamed) == whole.choices[0].text
    assert whole.usage.completion_tokens == 48

    messages = [{"role": "user", "content": prompt}]
    chunks = client.chat.completions.create(messages=messages, stream=True, **request)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(told) > 20

    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    counted = {
        name: sum(float(x.split()[-1]) for x in lines if x.startswith(f"{name}{{"))
        for name in (
            "vllm:spec_decode_num_draft_tokens_total",
            "vllm:spec_decode_num_accepted_tokens_total",
        )
    }
    assert all(value > 0 for value in counted.values()), counted
