"""A vLLM engine in a process of its own, which takes turns with others."""

import logging
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

#: Engines are forked from a process that has imported vLLM, once for all of them; vLLM
#: itself forks after this import, and it starts neither CUDA nor threads of its own.
PRELOADED = ["vllm.entrypoints.llm"]


@dataclass(frozen=True)
class Generation:
    """One request, alone on the engine.

    Attributes:
        token_ids: what was generated.
        text: the same as text.
        seconds: from the call to the last token.
        decode_seconds: from the first token to the last.
        num_drafts: verification steps that had drafts.
        accepted_per_position: accepted draft tokens by position.
    """

    token_ids: list[int]
    text: str
    seconds: float
    decode_seconds: float
    num_drafts: int
    accepted_per_position: list[int]


@dataclass(frozen=True)
class BatchGeneration:
    """Requests sent at once.

    Attributes:
        token_ids: what was generated, by request.
        seconds: from the call to the last token.
        num_draft_tokens, num_accepted_tokens: of all of them.
    """

    token_ids: list[list[int]]
    seconds: float
    num_draft_tokens: int
    num_accepted_tokens: int


def preload() -> None:
    """Begins to import vLLM for the engines to come, and returns at once.

    The environment must be theirs by then: libraries read some of it when imported.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


class EngineProcess:
    """Runs ``LLM(**engine_args)`` in a child; its output goes to a log file.

    The child is on its way when this is made, so that several start at the same time.
    What is asked of an engine waits until it is ready, as ``with`` does. Whatever asks
    raises a RuntimeError with the engine's last words if it has died.
    """

    def __init__(
        self,
        engine_args: dict[str, Any],
        log_file: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        preload()
        context = multiprocessing.get_context("forkserver")
        self._pipe, child_end = context.Pipe()
        variables = {**os.environ, **(environment or {})}
        self._process = context.Process(
            target=_serve,
            args=(child_end, engine_args, str(log_file), variables),
            daemon=True,
        )
        self._log_file = log_file
        self._is_ready = self._is_busy = False
        self._process.start()
        child_end.close()

    def wait_until_ready(self) -> None:
        """Until it can be asked; an engine that fails before that is ended."""
        if self._is_ready:
            return
        try:
            self._receive()
        except BaseException:
            self._end()  # and can be asked again, what its last words were
            raise
        self._is_ready = True

    @property
    def connection(self) -> Connection:
        """Can be read from when the engine is ready, or has died."""
        return self._pipe

    def generate(
        self, prompt_token_ids: list[int], sampling: dict[str, Any]
    ) -> Generation:
        """One request with ``SamplingParams(**sampling)``."""
        return self._ask(_generate, prompt_token_ids, sampling)

    def profile(
        self, prompt_token_ids: list[int], sampling: dict[str, Any]
    ) -> dict[str, float]:
        """Seconds after the first token, by what they went to: see ``TimedRunner``."""
        return self._ask(_profile, prompt_token_ids, sampling)

    def logits(
        self, prompt_token_ids: list[int], token_ids: list[int]
    ) -> list[tuple[int, float]]:
        """Logits of the target's best two tokens and of ``token_ids``, best first."""
        return self._ask(_logits, prompt_token_ids, token_ids)

    def describe(self) -> dict[str, Any]:
        """Its peak memory, room for keys and values, dtype, runner and scheduling."""
        return self._ask(_describe)

    def generate_batch(
        self, prompts: list[list[int]], sampling: dict[str, Any]
    ) -> BatchGeneration:
        """Tokens of every prompt, with the same ``SamplingParams(**sampling)``."""
        return self._ask(_generate_batch, prompts, sampling)

    def close(self) -> None:
        """Ends the child, at once where it is starting, or at work on what was left."""
        self._pipe.close()
        self._end()

    def last_words(self, count: int) -> str:
        """The last lines of its log that are not empty."""
        log = ""
        if self._log_file.exists():  # the child may not be so far
            log = self._log_file.read_text(encoding="utf-8", errors="replace")
        return "\n".join(list(filter(str.strip, log.splitlines()))[-count:])

    def _end(self) -> None:
        if self._is_busy or not self._is_ready:
            self._process.kill()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, *function_and_arguments: Any) -> Any:
        self.wait_until_ready()
        with suppress(BrokenPipeError):  # its last words are read below
            self._is_busy = True
            self._pipe.send(function_and_arguments)
        answer = self._receive()
        self._is_busy = False
        return answer

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(
                f"the engine stopped; its log is {self._log_file}, and ends:\n"
                f"{self.last_words(15)}"
            ) from None


def _serve(
    pipe: Connection,
    engine_args: dict[str, Any],
    log_file: str,
    variables: dict[str, str],
) -> None:
    os.environ.update(variables)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    # One process per engine: vLLM's others would wait actively and take turns badly.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    # Whatever the terminal is spared, a log says how far a start has come.
    logger = logging.getLogger("vllm")
    logger.setLevel(min(logger.level, logging.INFO))
    for handler in logger.handlers:
        handler.setLevel(min(handler.level, logging.INFO))
    llm = LLM(**engine_args, disable_log_stats=False)
    pipe.send(None)
    while True:
        try:
            function, *arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(function(llm, *arguments))


def _generate(llm: Any, prompt: list[int], sampling: dict[str, Any]) -> Generation:
    from vllm import SamplingParams

    before = _spec_decode_counters(llm)
    start = time.perf_counter()
    (request,) = llm.generate(
        [{"prompt_token_ids": prompt}], SamplingParams(**sampling), use_tqdm=False
    )
    seconds = time.perf_counter() - start
    after = _spec_decode_counters(llm)
    num_drafts, *accepted = (b - a for a, b in zip(before, after, strict=True))
    output, metrics = request.outputs[0], request.metrics
    return Generation(
        token_ids=list(output.token_ids),
        text=output.text,
        seconds=seconds,
        decode_seconds=metrics.last_token_ts - metrics.first_token_ts,
        num_drafts=num_drafts,
        accepted_per_position=accepted,
    )


class TimedRunner:
    """Measures the parts of a model runner's steps, in place, until it is closed.

    ``draft`` is the proposer's part, prompts among it; ``verify`` the rest of a step:
    the target's forward pass and sampling. Each part ends with the device idle, so that
    a profiled run is slower than others.
    """

    STEPS = ("execute_model", "sample_tokens")

    def __init__(self, runner: Any) -> None:
        self._spans: list[tuple[str, float, float]] = []
        self._replaced: list[tuple[Any, str]] = []
        for name in self.STEPS:
            self._replace(runner, name, "step")
        if hasattr(runner, "propose_draft_token_ids"):
            self._replace(runner, "propose_draft_token_ids", "draft")
        elif speculator := getattr(runner, "speculator", None):  # model runner V2
            self._replace(speculator, "propose", "draft")

    def _replace(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = _when_idle()
            result = function(*args, **kwargs)
            self._spans.append((part, start, _when_idle()))
            return result

        setattr(owner, name, timed)
        self._replaced.append((owner, name))

    def close(self) -> list[tuple[str, float, float]]:
        """Parts, and when each began and ended (``time.monotonic``)."""
        for owner, name in self._replaced:
            delattr(owner, name)  # the instance's own, over the class's
        return self._spans


def _when_idle() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def _profile(llm: Any, prompt: list[int], sampling: dict[str, Any]) -> dict[str, float]:
    from vllm import SamplingParams

    timers: list[TimedRunner] = []
    llm.collective_rpc(lambda worker: timers.append(TimedRunner(worker.model_runner)))
    (request,) = llm.generate(
        [{"prompt_token_ids": prompt}], SamplingParams(**sampling), use_tqdm=False
    )
    first, last = request.metrics.first_token_ts, request.metrics.last_token_ts
    spans = [span for timer in timers for span in timer.close()]
    parts = {
        name: sum(
            end - start for part, start, end in spans if part == name and start > first
        )
        for name in ("step", "draft")
    }
    return {
        "draft": parts["draft"],
        "verify": parts["step"] - parts["draft"],
        "rest": last - first - parts["step"],
    }


def _logits(llm: Any, prompt: list[int], tokens: list[int]) -> list[tuple[int, float]]:
    """As the model computes them: vLLM's logprobs would not say how large they are."""
    import torch
    from vllm import SamplingParams

    computed: list[torch.Tensor] = []

    def watch(model: Any) -> None:
        compute_logits = model.compute_logits

        def watched(*args: Any, **kwargs: Any) -> Any:
            logits = compute_logits(*args, **kwargs)
            computed.append(logits[-1].to("cpu", torch.float32, copy=True))
            return logits

        model.compute_logits = watched

    llm.apply_model(watch)
    try:
        llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(temperature=0, max_tokens=1),
            use_tqdm=False,
        )
    finally:
        llm.apply_model(lambda model: delattr(model, "compute_logits"))
    logits = computed[-1]
    found = {*logits.topk(2).indices.tolist(), *tokens}
    return sorted(
        ((token, logits[token].item()) for token in found), key=lambda each: -each[1]
    )


def _describe(llm: Any) -> dict[str, Any]:
    import resource

    import torch

    config = llm.llm_engine.vllm_config
    runners: list[Any] = []
    llm.collective_rpc(lambda worker: runners.append(type(worker.model_runner)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    cache = config.cache_config
    return {
        "peak_memory_bytes": peak,
        "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "model_runner": f"{runners[0].__module__}.{runners[0].__qualname__}",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
    }


def _generate_batch(
    llm: Any, prompts: list[list[int]], sampling: dict[str, Any]
) -> BatchGeneration:
    from vllm import SamplingParams

    before = _metrics(llm)
    start = time.perf_counter()
    requests = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(**sampling),
        use_tqdm=False,
    )
    seconds = time.perf_counter() - start
    after = _metrics(llm)
    names = ("num_draft_tokens", "num_accepted_tokens")
    counters = [f"vllm:spec_decode_{name}" for name in names]
    return BatchGeneration(
        [list(request.outputs[0].token_ids) for request in requests],
        seconds,
        *(
            after[counter].value - before[counter].value if counter in after else 0
            for counter in counters
        ),
    )


def _spec_decode_counters(llm: Any) -> list[int]:
    """Number of drafts so far, then accepted tokens by position."""
    found = _metrics(llm)
    if "vllm:spec_decode_num_drafts" not in found:
        return [0]
    accepted = found["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return [found["vllm:spec_decode_num_drafts"].value, *accepted]


def _metrics(llm: Any) -> dict[str, Any]:
    return {metric.name: metric for metric in llm.get_metrics()}
