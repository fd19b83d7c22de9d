"""What is asked of engines of one model runner, and whether the answers hold.

Whatever drafts, greedy tokens are those of plain vLLM, in float32. vLLM verifies
several tokens in other kernels than it decodes one, so that outputs may part where two
logits are a tie within rounding: of that the target in float64 is the judge.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from benchmarks.gpu_check.rows import (
    CheckFailedError,
    NotApplicableError,
    Row,
    row_of,
)
from benchmarks.gpu_check.sizes import Sizes
from vllm_budgetdraft.comparison.engine_process import BatchGeneration

#: Largest difference of two logits that float32 may see the other way: its error is
#: below 1e-5 here, and the two best are as close as this after one token in a thousand.
TIE = 1e-4
#: Least share of its own drafts that a target accepts.
SELF_ACCEPTANCE = 0.99


class Engine(Protocol):
    """What is asked of an ``EngineProcess``."""

    def wait_until_ready(self) -> None: ...

    def describe(self) -> dict[str, Any]: ...

    def generate_batch(
        self, prompts: list[list[int]], sampling: dict[str, Any]
    ) -> BatchGeneration: ...


#: Of a context and two tokens: by how much the target's logits of them differ.
Gap = Callable[[list[int], int, int], float]


class Checks:
    """The checks of one runner's engines, by name.

    Args:
        engines: "plain", "self", "budgeted", and perhaps "eager" and "half".
        log: of an engine, what it has logged.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        sizes: Sizes,
        runner: str,
        gap: Gap,
        log: Callable[[str], str],
    ) -> None:
        self._engines, self._sizes, self._runner = engines, sizes, runner
        self._gap, self._log = gap, log
        rng = random.Random(0)
        vocab_size = sizes.target["vocab_size"]
        self.prompts = [
            [rng.randrange(vocab_size) for _ in range(length)]
            for length in sizes.prompts
        ]
        self._greedy: dict[str, BatchGeneration] = {}

    def rows(self, *, is_gpu: bool) -> Iterator[Row]:
        """Each as soon as it is known."""
        checks = {f"{name} starts": self._starts(name) for name in self._engines}
        others = [name for name in self._engines if name not in ("plain", "half")]
        checks |= {f"{name} is greedy": self._is_greedy(name) for name in others}
        checks["self accepts itself"] = self._accepts_itself
        checks["budgeted at temperature 1"] = self._draws
        if "half" in self._engines:
            checks["half answers"] = self._answers
        checks["CUDA graphs"] = self._has_graphs if is_gpu else _no_gpu
        for name, check in checks.items():
            yield row_of(f"{self._runner} {name}", check)

    def _starts(self, name: str) -> Callable[[], str]:
        def check() -> str:
            engine = self._engines[name]
            engine.wait_until_ready()
            found = engine.describe()["model_runner"]
            is_v2 = re.search(r"\.(cpu|gpu)\.model_runner", found) is not None
            if is_v2 != (self._runner == "V2"):
                raise CheckFailedError(f"it has another runner, {found}")
            return found.rpartition(".")[0]

        return check

    def _is_greedy(self, name: str) -> Callable[[], str]:
        def check() -> str:
            expected = self._generate_greedily("plain").token_ids
            found = self._generate_greedily(name)
            gaps = {
                len(prompt): gap
                for prompt, tokens, wanted in zip(
                    self.prompts, found.token_ids, expected, strict=True
                )
                if (gap := self._parting(prompt, tokens, wanted)) is not None
            }
            what = ", ".join(f"{n} tokens (by {gap:.2g})" for n, gap in gaps.items())
            figure = f"{len(expected) - len(gaps)} of {len(expected)} prompts"
            if gaps:
                figure += f"; otherwise after {what}"
            are_ties = all(abs(gap) <= TIE for gap in gaps.values())
            if len(gaps) > len(expected) // 2 or not are_ties:
                raise CheckFailedError(f"{figure}, where {TIE} is a tie")
            return f"{figure}; {_accepted(found)}"

        return check

    def _generate_greedily(self, name: str) -> BatchGeneration:
        if name not in self._greedy:
            self._greedy[name] = self._generate(name, temperature=0.0)
        return self._greedy[name]

    def _generate(self, name: str, temperature: float) -> BatchGeneration:
        """Tokens of every prompt at once.

        Raises:
            CheckFailedError: not as many as were asked for.
        """
        found = self._engines[name].generate_batch(
            self.prompts,
            {
                "temperature": temperature,
                "max_tokens": self._sizes.new_tokens,
                "ignore_eos": True,
                "detokenize": False,
            },
        )
        lengths = [len(tokens) for tokens in found.token_ids]
        if lengths != [self._sizes.new_tokens] * len(self.prompts):
            raise CheckFailedError(f"{name} generated {lengths} tokens")
        if name != "plain" and not found.num_draft_tokens:
            raise CheckFailedError(f"{name} drafted nothing")
        return found

    def _parting(
        self, prompt: list[int], tokens: list[int], wanted: list[int]
    ) -> float | None:
        """By how much the logits of the first two tokens that differ do; or None."""
        for index, (found, expected) in enumerate(zip(tokens, wanted, strict=True)):
            if found != expected:
                return self._gap(prompt + wanted[:index], expected, found)
        return None

    def _accepts_itself(self) -> str:
        found = self._generate_greedily("self")
        share = found.num_accepted_tokens / found.num_draft_tokens
        if share < SELF_ACCEPTANCE:
            raise CheckFailedError(f"{_accepted(found)}, below {SELF_ACCEPTANCE}")
        return _accepted(found)

    def _draws(self) -> str:
        return self._accepts_some("budgeted", temperature=1.0)

    def _answers(self) -> str:
        return f"bfloat16; {self._accepts_some('half', temperature=0.0)}"

    def _accepts_some(self, name: str, temperature: float) -> str:
        found = self._generate(name, temperature)
        if not found.num_accepted_tokens:
            raise CheckFailedError(f"none of {found.num_draft_tokens} drafts accepted")
        return _accepted(found)

    def _has_graphs(self) -> str:
        names = [name for name in self._engines if name not in ("plain", "eager")]
        counts = {name: num_graphs(self._log(name)) for name in names}
        figure = ", ".join(f"{name} {count}" for name, count in counts.items())
        if not all(counts.values()):
            raise CheckFailedError(f"captured: {figure}")
        return f"captured: {figure}"


def _accepted(found: BatchGeneration) -> str:
    share = found.num_accepted_tokens / found.num_draft_tokens
    return f"{share:.1%} of {found.num_draft_tokens:,} drafts accepted"


def _no_gpu() -> str:
    raise NotApplicableError("there is no GPU")


def num_graphs(log: str) -> int:
    """Of drafts, by what ``core_loader.capture_graphs`` logs."""
    found = re.search(r"captured (\d+) CUDA graphs of its drafts", log)
    return int(found[1]) if found else 0
