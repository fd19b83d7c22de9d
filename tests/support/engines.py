"""vLLM engines for tests, each in a process of its own."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.processes import nothing, run_in_process, vllm_process

MODELS = Path(__file__).resolve().parents[2] / "models"
TARGET = str(MODELS / "books-9m")
DRAFTER = str(MODELS / "books-9m-drafter")
#: A drafter that has never seen a position beyond 511.
NATIVE_512 = str(MODELS / "books-9m-native512")

#: By which the target drafts for itself.
FLEXDRAFT = str(MODELS / "books-9m-flexdraft")

#: In float32 an argmax does not depend on how many tokens vLLM verifies at once.
ENGINE_ARGS = {
    "model": TARGET,
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 8,
}


@dataclass(frozen=True)
class Job:
    """Prompts sent at once, with sampling parameters each (or the same for all)."""

    prompts: list[list[int]]
    sampling: list[dict[str, Any]] | dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Of one job: tokens and text by prompt, and what was drafted and accepted."""

    token_ids: list[list[int]]
    texts: list[str]
    num_draft_tokens: int
    num_accepted_tokens: int


def run_jobs(
    engine_args: dict[str, Any],
    jobs: dict[str, Job],
    prepare: Callable[[], None] = nothing,
) -> dict[str, Answer]:
    """Runs the jobs one after the other on one new engine.

    Args:
        prepare: what its process does first.
    """
    return run_in_process(_run, ENGINE_ARGS | engine_args, jobs, prepare=prepare)


def _run(engine_args: dict[str, Any], jobs: dict[str, Job]) -> dict[str, Answer]:
    from vllm import LLM

    llm = LLM(**engine_args, disable_log_stats=False)
    return {name: _answer(llm, job) for name, job in jobs.items()}


def _answer(llm: Any, job: Job) -> Answer:
    from vllm import SamplingParams

    before = _counters(llm)
    settings = job.sampling
    if isinstance(settings, dict):
        settings = [settings] * len(job.prompts)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job.prompts],
        [SamplingParams(**{"temperature": 0.0, **each}) for each in settings],
        use_tqdm=False,
    )
    after = _counters(llm)
    return Answer(
        token_ids=[list(output.outputs[0].token_ids) for output in outputs],
        texts=[output.outputs[0].text for output in outputs],
        num_draft_tokens=after[0] - before[0],
        num_accepted_tokens=after[1] - before[1],
    )


def _counters(llm: Any) -> tuple[int, int]:
    found = {metric.name: metric for metric in llm.get_metrics()}
    names = ("num_draft_tokens", "num_accepted_tokens")
    counters = [found.get(f"vllm:spec_decode_{name}") for name in names]
    drafted, accepted = (counter.value if counter else 0 for counter in counters)
    return drafted, accepted


def book_tokens(num_tokens: int, start: int = 0) -> list[int]:
    """Tokens of a real book that neither model was trained on."""
    from transformers import AutoTokenizer

    from vllm_budgetdraft.comparison.prompts import EXCERPT

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    text = EXCERPT.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens[start : start + num_tokens]


def wait_until(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.5)
    return False


@dataclass(frozen=True)
class Request:
    """A request to an engine that is stepped by hand.

    Attributes:
        as_embeddings: whether the prompt is sent as the target's embeddings of it.
        adapter: folder of a LoRA adapter.
        priority: lower goes first, where the engine's scheduling policy is "priority".
        salt: its ``cache_salt``.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    as_embeddings: bool = False
    adapter: str | None = None
    priority: int = 0
    salt: str | None = None


@dataclass
class Course:
    """What became of a request.

    Attributes:
        outputs: token ids by index, of which n > 1 has several.
        lengths: output tokens of index 0, after each step that brought some.
        rows: rows of the batch that it had.
        num_slots_lost: how often it went on living without the draft slot it had.
    """

    name: str
    request: Request
    outputs: dict[int, list[int]] = field(default_factory=dict)
    text: str = ""
    finish_reason: str | None = None
    lengths: list[int] = field(default_factory=list)
    rows: set[int] = field(default_factory=set)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_slots_lost: int = 0

    @property
    def token_ids(self) -> list[int]:
        return self.outputs.get(0, [])

    @property
    def gains(self) -> list[int]:
        """Tokens that each step brought."""
        return [b - a for a, b in zip([0, *self.lengths], self.lengths, strict=False)]


class SteppedEngine:
    """An engine of this process, requests and their courses.

    Attributes:
        courses: of every request so far, in the order in which they came.
        live: of requests that are not over, by name. The name is vLLM's id.
    """

    def __init__(self, engine_args: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**engine_args, disable_log_stats=False)
        self._engine = self._llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._runner = self._engine.model_executor.driver_worker.worker.model_runner
        # What drafts: of runner V1, within a proposer; of V2, the speculator itself.
        proposer = getattr(self._runner, "drafter", None)
        speculator = getattr(self._runner, "speculator", None)
        self._drafter = getattr(proposer, "_drafting", speculator)
        self._holdings: dict[str, Any] = {}
        self.max_model_len = self._llm.model_config.max_model_len
        self.courses: list[Course] = []
        self.live: dict[str, Course] = {}

    @property
    def schedules_ahead(self) -> bool:
        return self._llm.llm_engine.vllm_config.scheduler_config.async_scheduling

    def add(self, name: str, request: Request) -> Course:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import StructuredOutputsParams

        sampling = {"temperature": 0.0, **request.sampling}
        if grammar := sampling.pop("structured_outputs", None):
            sampling["structured_outputs"] = StructuredOutputsParams(**grammar)
        prompt: dict[str, Any] = {"prompt_token_ids": request.prompt}
        if request.as_embeddings:
            prompt = {"prompt_embeds": _target_embeddings()[request.prompt]}
        if request.salt:
            prompt["cache_salt"] = request.salt
        adapter = request.adapter and LoRARequest("adapter", 1, request.adapter)
        internal_name = self._engine.add_request(
            name,
            prompt,
            SamplingParams(**sampling),
            lora_request=adapter,
            priority=request.priority,
        )
        assert internal_name == name
        self.live[name] = course = Course(name, request)
        self.courses.append(course)
        return course

    def reset_prefix_cache(self) -> None:
        self.become_idle()
        assert self._llm.reset_prefix_cache()

    def sleep(self, level: int) -> None:
        self._llm.sleep(level)

    def abort(self, name: str) -> Course:
        self._engine.abort_request([name])
        return self.live.pop(name)

    def step(self) -> None:
        outputs = self._engine.step()
        self._observe()
        for output in outputs:
            course = self.live[output.request_id]
            course.num_cached_tokens = output.num_cached_tokens or 0
            for each in output.outputs:
                course.outputs[each.index] = list(each.token_ids)
                if each.index == 0:
                    course.text, course.finish_reason = each.text, each.finish_reason
                    course.lengths.append(len(each.token_ids))
            if output.finished:
                del self.live[output.request_id]

    def step_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(2000):
            if condition():
                return
            self.step()
        raise AssertionError("the condition did not come about in 2000 steps")

    def finish(self) -> None:
        self.step_until(lambda: not self.live)

    def counters(self) -> dict[str, int]:
        """Draft tokens and accepted ones since the engine started."""
        drafted, accepted = _counters(self._llm)
        return {"drafted": drafted, "accepted": accepted}

    def become_idle(self) -> None:
        """Steps as a server does once every request is over."""
        self.finish()
        core = self._engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            self.step()

    def check_draft_cache(self) -> None:
        """Raises if a page is held once every request is over, or drafting failed."""
        drafter = self._drafter
        if drafter is None:
            return
        self.become_idle()
        assert drafter._faults.num_faults == 0, "drafting failed"
        core = getattr(drafter, "_core", None)
        if core is None or not hasattr(core, "cache"):  # the target drafts for itself
            return
        cache = core.cache
        cache.check_invariants()
        free = core.num_free_pages
        assert free == cache.pool.num_pages, "pages are still held"

    def _observe(self) -> None:
        runner = self._runner
        if hasattr(runner, "req_states"):  # V2's, which has no rows that move
            rows = runner.req_states.req_id_to_index
        else:
            rows = {name: row for row, name in enumerate(runner.input_batch.req_ids)}
        for name, row in rows.items():
            if course := self.live.get(name):
                course.rows.add(row)
        for name, request in self._scheduler.requests.items():
            if course := self.live.get(name):
                course.num_preemptions = request.num_preemptions
        slots = getattr(self._drafter, "_slots", None)
        if slots is not None:
            held = dict(slots._held)
            for name, holding in self._holdings.items():
                lives_on = self._runner.requests.get(name) is holding.state
                if lives_on and held.get(name) is not holding:
                    self.live[name].num_slots_lost += 1
            self._holdings = held


@dataclass(frozen=True)
class Played:
    """What came of a script.

    Attributes:
        courses: of every request, in the order in which they came.
        drafted, accepted: draft tokens verified, and found right.
    """

    courses: list[Course]
    drafted: int
    accepted: int


class EngineProcess:
    """A process with one engine, which plays scripts on it."""

    def __init__(self, processes: ProcessPoolExecutor) -> None:
        self._processes = processes

    def play(self, script: Callable[..., None], *args: Any) -> Played:
        """Runs ``script(engine, *args)``, a function of some module's top level.

        Requests that it leaves are run to their end; no page of theirs may leak.
        """
        return self._processes.submit(_play, script, args).result()


@contextmanager
def engine_process(
    engine_args: dict[str, Any], prepare: Callable[[], None] = nothing
) -> Iterator[EngineProcess]:
    """
    Args:
        prepare: what the process does first.
    """
    with vllm_process(
        prepare,
        VLLM_DISABLE_REQUEST_ID_RANDOMIZATION="1",
        BUDGETDRAFT_CHECK_INVARIANTS="1",
    ) as process:
        process.submit(_start, ENGINE_ARGS | engine_args).result()
        yield EngineProcess(process)


_stepped_engine: SteppedEngine


def _start(engine_args: dict[str, Any]) -> None:
    global _stepped_engine
    _stepped_engine = SteppedEngine(engine_args)


def _play(script: Callable[..., None], args: tuple[Any, ...]) -> Played:
    engine = _stepped_engine
    engine.courses = []
    before = engine.counters()
    try:
        script(engine, *args)
        engine.finish()
    finally:
        for name in list(engine.live):
            engine.abort(name)
    after = engine.counters()
    engine.check_draft_cache()
    return Played(engine.courses, **{key: after[key] - before[key] for key in after})


@cache
def _target_embeddings() -> Any:
    from safetensors.torch import load_file

    weights = load_file(Path(TARGET) / "model.safetensors")
    return weights["model.embed_tokens.weight"].float()
