"""Many requests at a server with few places and few KV blocks, some of them cancelled.

Those that are not get plain vLLM's tokens. Afterwards every page of the draft cache is
free, nothing has failed in drafting, and memory is what it was after the first third.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import httpx
import pytest

from tests.support.engines import DRAFTER, book_tokens, wait_until
from tests.support.servers import Server, serve

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_REQUESTS = 300
NUM_CANCELLED = 90
CONCURRENCY = 16
MAX_MODEL_LEN = 2048
#: For everything that is sent to one server; its start has a limit of its own.
LIMIT_SECONDS = 420

POLICIES = {
    "chunk_retrieval": {"draft_prefill": "full"},
    "heavy_hitter": {"draft_prefill": "streaming"},
    "sink_window": {"draft_prefill": "streaming", "position_mode": "absolute"},
}

#: Else plain vLLM's worker grows by 100 MiB in the last two thirds: oneDNN keeps code
#: for every number of tokens that a step had, and malloc keeps freed buffers.
KEEPS_NO_MEMORY = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
#: Four times what plain vLLM then grows by; keys and values of prompts would be 36.
MOST_GROWTH_MIB = 12


@dataclass(frozen=True)
class Request:
    """What a client sends, and when it leaves; it stays where both are None.

    Attributes:
        leaves_after_chunks: that it has received.
        leaves_after_seconds: since it sent.
    """

    prompt: list[int]
    max_tokens: int
    leaves_after_chunks: int | None = None
    leaves_after_seconds: float | None = None

    @property
    def stays(self) -> bool:
        return self.leaves_after_chunks is None and self.leaves_after_seconds is None


@dataclass(frozen=True)
class Reply:
    token_ids: list[int]
    is_whole: bool


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    numbers = random.Random(0)
    book = book_tokens(1_000_000)
    requests = []
    for _ in range(NUM_REQUESTS):
        length = int(5 * 240 ** numbers.random())  # 5 to 1200, half of them below 78
        start = numbers.randrange(len(book) - length)
        prompt = book[start : start + length]
        requests.append(Request(prompt, max_tokens=numbers.randint(1, 120)))
    for i in numbers.sample(range(NUM_REQUESTS), NUM_CANCELLED):
        if numbers.random() < 0.5:
            # A chunk has up to 6 tokens.
            num_chunks = numbers.randint(0, requests[i].max_tokens // 6)
            requests[i] = replace(requests[i], leaves_after_chunks=num_chunks)
        else:
            seconds = numbers.uniform(0.0, 3.0)
            requests[i] = replace(requests[i], leaves_after_seconds=seconds)
    return requests


@pytest.fixture(scope="module")
def expected(requests, tmp_path_factory) -> list[list[int]]:
    """Plain vLLM's tokens."""
    staying = [Request(request.prompt, request.max_tokens) for request in requests]
    deadline = time.monotonic() + LIMIT_SECONDS
    with serve(tmp_path_factory.mktemp("plain"), "--max-num-seqs", "16") as server:
        return [reply.token_ids for reply in send_all(server, staying, deadline)]


def send_all(
    server: Server, requests: Iterable[Request], deadline: float
) -> list[Reply]:
    """Replies in the order of requests; the server is idle again."""

    async def run() -> list[Reply]:
        places = asyncio.Semaphore(CONCURRENCY)

        async def send_in_turn(request: Request) -> Reply:
            async with places:
                return await send(client, request)

        async with (
            asyncio.timeout(deadline - time.monotonic()),
            httpx.AsyncClient(base_url=server.url, timeout=None) as client,
        ):
            return await asyncio.gather(*map(send_in_turn, requests))

    try:
        replies = asyncio.run(run())
    except TimeoutError:
        raise AssertionError(f"not done after {LIMIT_SECONDS} s") from None
    assert wait_until(lambda: is_idle(server), seconds=30), "requests go on for nobody"
    return replies


async def send(client: httpx.AsyncClient, request: Request) -> Reply:
    body = {
        "model": "books",
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    token_ids: list[int] = []
    num_chunks = 0
    try:
        async with (
            asyncio.timeout(request.leaves_after_seconds),
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            response.raise_for_status()
            lines = response.aiter_lines()
            while num_chunks != request.leaves_after_chunks:
                line = await anext(lines)
                if line == "data: [DONE]":
                    return Reply(token_ids, is_whole=True)
                if line:
                    chunk = json.loads(line.removeprefix("data: "))
                    token_ids += chunk["choices"][0]["token_ids"]
                    num_chunks += 1
    except TimeoutError:
        pass
    return Reply(token_ids, is_whole=False)


def is_idle(server: Server) -> bool:
    metrics = server.metrics()
    states = ("running", "waiting")
    return not any(metrics[f"vllm:num_requests_{state}"] for state in states)


def check(requests, replies, expected) -> None:
    for i, (request, reply) in enumerate(zip(requests, replies, strict=True)):
        if reply.is_whole:
            assert reply.token_ids == expected[i], f"request {i}"
        else:
            assert not request.stays, f"request {i} ended early"
            assert reply.token_ids == expected[i][: len(reply.token_ids)], (
                f"request {i}"
            )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_soaked_server_gives_plain_tokens_and_keeps_nothing(
    policy, requests, expected, tmp_path
):
    settings = {
        "method": "budgetdraft",
        "adaptive_draft_length": False,
        "model": DRAFTER,
        "num_speculative_tokens": 5,
        "kv_budget": 128,
        "recent_window": 64,
        "draft_prefill_chunk": 128,  # so that some leave in the midst of a prompt
        "eviction_policy": policy,
        **POLICIES[policy],
    }
    with serve(
        tmp_path,
        *("--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
        *("--block-size", "32", "--num-gpu-blocks-override", "66"),
        *("--speculative-config", json.dumps(settings)),
        BUDGETDRAFT_CHECK_INVARIANTS="1",
        **KEEPS_NO_MEMORY,
    ) as server:
        deadline = time.monotonic() + LIMIT_SECONDS
        third = NUM_REQUESTS // 3
        replies = send_all(server, requests[:third], deadline)
        early = server.resident_mib()
        replies += send_all(server, requests[third:], deadline)
        late = server.resident_mib()
        metrics = server.metrics()

        left = [reply for reply in replies if not reply.is_whole]
        num_preemptions, num_drafted, num_accepted = (
            metrics[f"vllm:{name}_total"]
            for name in (
                "num_preemptions",
                "spec_decode_num_draft_tokens",
                "spec_decode_num_accepted_tokens",
            )
        )
        print(
            f"{len(left)} left, {sum(not reply.token_ids for reply in left)} of them "
            f"before a token; {num_preemptions:.0f} preemptions; {num_accepted:.0f} of "
            f"{num_drafted:.0f} drafts accepted; {early:.0f} MiB, then {late:.0f}"
        )
        check(requests, replies, expected)
        assert len(left) > NUM_CANCELLED / 2
        assert num_preemptions > 0
        assert num_accepted > 0
        assert metrics["vllm_budgetdraft:draft_faults_total"] == 0
        assert late - early < MOST_GROWTH_MIB

        in_use = "vllm_budgetdraft:pages_in_use"
        assert wait_until(lambda: server.metrics()[in_use] == 0, seconds=10)
