"""The OpenAI-compatible server with BudgetDraft, as a client sees it."""

import json
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.engines import DRAFTER, wait_until
from tests.support.servers import Server, serve

if TYPE_CHECKING:
    from openai import OpenAI

pytestmark = pytest.mark.vllm

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
PROMPT = "It was a dark night, and the old man sat by the fire"
MESSAGES = [{"role": "user", "content": PROMPT}]
REQUEST = {"model": "books", "temperature": 0.0, "max_tokens": 48}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    settings = {
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "model": DRAFTER,
        "num_speculative_tokens": 4,
        "kv_budget": 256,
    }
    with serve(
        folder,
        *("--max-num-seqs", "4", "--chat-template", str(template)),
        *("--speculative-config", json.dumps(settings)),
        VLLM_LOG_STATS_INTERVAL="1",
    ) as server:
        assert "BudgetDraft memory" in server.log.read_text()
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> "OpenAI":
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def complete(client: "OpenAI", **xargs: Any) -> str:
    completion = client.completions.create(
        prompt=PROMPT, extra_body={"vllm_xargs": xargs}, **REQUEST
    )
    return completion.choices[0].text


def test_completions_and_chats_stream(client: "OpenAI") -> None:
    whole = client.completions.create(prompt=PROMPT, **REQUEST)
    pieces = client.completions.create(prompt=PROMPT, stream=True, **REQUEST)
    streamed = [piece.choices[0].text for piece in pieces]
    assert len(streamed) > 1
    assert "".join(streamed) == whole.choices[0].text
    assert whole.usage.completion_tokens == 48

    chunks = client.chat.completions.create(messages=MESSAGES, stream=True, **REQUEST)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(told) > 20


def test_metrics_are_vllms_and_ours(server: Server, client: "OpenAI") -> None:
    """The worker counts, and another process answers."""
    complete(client)
    metrics = server.metrics()
    assert metrics["vllm:generation_tokens_total"] >= 48
    assert metrics["vllm:spec_decode_num_draft_tokens_total"] > 0
    assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert metrics["vllm_budgetdraft:pages_free"] > 0
    assert metrics["vllm_budgetdraft:draft_length"] == 4
    assert metrics["vllm_budgetdraft:draft_steps_total"] > 0
    assert 0 < metrics["vllm_budgetdraft:draft_seconds_total"] < 60
    # Of a counter with labels nothing is shown before it first counts.
    assert metrics["vllm_budgetdraft:draft_faults_total"] == 0


@pytest.mark.parametrize("ends", ["by itself", "with its client"])
def test_pages_are_in_use_while_a_request_is_there(ends, server, client) -> None:
    # Enough to be seen by somebody who asks for metrics on a busy machine.
    options = {**REQUEST, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    pieces = client.completions.create(prompt=PROMPT, stream=True, **options)
    next(pieces)
    in_use = "vllm_budgetdraft:pages_in_use"
    assert wait_until(lambda: server.metrics()[in_use] > 0, seconds=10)
    if ends == "by itself":
        assert len(list(pieces)) > 1
    pieces.close()
    assert wait_until(lambda: server.metrics()[in_use] == 0, seconds=10)


def test_a_long_prompt_is_evicted_and_one_that_wants_no_drafts_is_counted(
    server: Server, client: "OpenAI"
) -> None:
    before = server.metrics()
    client.completions.create(prompt=" and so on" * 300, **REQUEST)
    complete(client, num_speculative_tokens=0)
    after = server.metrics()
    evicted = "vllm_budgetdraft:evicted_tokens_total"
    assert after[evicted] - before[evicted] > 100
    skipped = "vllm_budgetdraft:drafts_skipped_total"
    assert after[skipped] - before[skipped] >= REQUEST["max_tokens"] - 1


def test_the_log_has_a_line_like_vllms(server: Server, client: "OpenAI") -> None:
    complete(client)
    line = "BudgetDraft metrics: Draft length: 4.0, Draft time: "
    assert wait_until(lambda: line in server.log.read_text(), seconds=30)


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed"
)
def test_prometheus_has_what_the_dashboard_shows(server, client, tmp_path) -> None:
    from tests.support.prometheus import panels, scrape

    with scrape(server.url, tmp_path) as prometheus:
        for num_speculative_tokens in (4, 0):
            complete(client, num_speculative_tokens=num_speculative_tokens)
            time.sleep(2.5)  # two scrapes
        shown = {title: prometheus.query(query) for title, query in panels()}
    without = {title for title, series in shown.items() if not series}
    assert without == {"Failures in drafting"}  # there were none
    for title, series in shown.items():
        for each in series:
            assert float(each["value"][1]) >= 0, title
    reasons = {each["metric"]["reason"] for each in shown["Requests without drafts"]}
    assert "off" in reasons
    (acceptance,) = shown["Acceptance length"]
    assert 1 < float(acceptance["value"][1]) < 6


@pytest.mark.parametrize(
    ("xargs", "most_per_step"),
    [
        ({"num_speculative_tokens": 0}, 0),
        ({"num_speculative_tokens": 2, "kv_budget": 64}, 2),
    ],
)
def test_a_request_that_asks_for_less_gets_the_same_text(
    xargs, most_per_step, server, client
):
    text = complete(client)
    before = server.metrics()
    assert complete(client, **xargs) == text
    after = server.metrics()
    names = ("num_drafts", "num_draft_tokens")
    num_steps, num_tokens = (
        after[name] - before[name]
        for name in (f"vllm:spec_decode_{each}_total" for each in names)
    )
    assert num_tokens <= most_per_step * num_steps
    assert (num_tokens > 0) == (most_per_step > 0)


@pytest.mark.parametrize(
    ("key", "value", "limits"),
    [
        ("kv_budget", 257, "16 to 256"),
        ("kv_budget", 8, "16 to 256"),
        ("kv_budget", "many", "integer"),
        ("num_speculative_tokens", 5, "0 to 4"),
        ("num_speculative_tokens", -1, "0 to 4"),
    ],
)
def test_what_the_server_does_not_allow_is_a_bad_request(key, value, limits, client):
    from openai import BadRequestError

    options = {"extra_body": {"vllm_xargs": {key: value}}, **REQUEST}
    for ask in (
        lambda: client.completions.create(prompt=PROMPT, **options),
        lambda: client.chat.completions.create(messages=MESSAGES, **options),
    ):
        with pytest.raises(BadRequestError) as caught:
            ask()
        for part in (f"{key}={value!r}", limits):
            assert part in caught.value.message
    assert complete(client)
