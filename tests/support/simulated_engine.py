"""An engine of a clock and dice, whose draft length ``AdaptiveLength`` chooses."""

from collections.abc import Callable
from random import Random

import numpy as np

from vllm_budgetdraft.proposer.adaptive_length import AdaptiveLength
from vllm_budgetdraft.proposer.step_costs import ByLength, StepCosts

#: The first step of a batch size and length takes so many times as long.
FIRST = 1.4
#: Step time as a share of its mean varies by so much.
NOISE = 0.05
#: An outlier takes so many times as long.
OUTLIER = 50
#: How much of its drift a step hands on to the next one.
DRIFT_MEMORY = 0.99
#: Steps of a burst, which all take so many times as long.
BURST_STEPS, BURST = 20, 1.8


def expected_tokens(chances: list[float], length: int) -> float:
    """Of a step that verifies so many drafts; chances are of those before accepted."""
    total = chance = 1.0
    for each in chances[:length]:
        chance *= each
        total += chance
    return total


class KnownCosts(StepCosts):
    """Times at warm-up of an engine whose steps take whatever a function says."""

    def __init__(self, seconds: Callable[[int, int], float], max_length: int) -> None:
        super().__init__({}, {}, max_length)
        object.__setattr__(self, "seconds", seconds)

    def by_length(self, batch_size: int) -> ByLength:
        lengths = range(self.max_length + 1)
        return np.array([self.seconds(batch_size, length) for length in lengths])


class SimulatedEngine:
    """Requests that decode together, and never end.

    Attributes:
        adaptive: what chooses.
        chances: of each draft, that it is accepted if those before it are.
        lengths: of every step.
        now: its clock.
    """

    def __init__(
        self,
        seconds: Callable[[int, int], float],
        chances: list[float],
        batch_size: int,
        *,
        append_seconds: float,
        costs: Callable[[int, int], float] | None = None,
        lengths: list[int] | None = None,
        outliers: float = 0.0,
        drift: float = 0.0,
        bursts: float = 0.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            seconds: mean time of a step, of batch size and draft length.
            append_seconds: to feed as many tokens as one call does to every request.
            costs: what was timed at warm-up, as ``seconds``; these if None.
            lengths: to choose from, all if None.
            outliers: share of the steps.
            drift: standard deviation of the slow part of the noise, a logarithm.
            bursts: share of the steps that begin one.
        """
        known = KnownCosts(costs or seconds, len(chances))
        self.adaptive = AdaptiveLength(known, lengths)
        self.chances, self.lengths, self.now = chances, list[int](), 0.0
        self._seconds, self._append_seconds = seconds, append_seconds
        self._outliers, self._random = outliers, Random(seed)
        self._drift, self._slowness = drift, 0.0
        self._bursts, self._burst_left = bursts, 0
        self._num_started = 0
        self._known: set[tuple[int, int]] = set()
        # By request, tokens that came since its draft cache was fed.
        self._missing: dict[str, int] = {}
        self._outcomes: dict[str, tuple[int, int]] = {}
        self.resize(batch_size)

    def resize(self, batch_size: int) -> None:
        """The newest requests end, or others come."""
        for request in list(self._missing)[batch_size:]:
            del self._missing[request]
            self._outcomes.pop(request, None)
        while len(self._missing) < batch_size:
            self._num_started += 1
            self._missing[str(self._num_started)] = 0

    def wait(self, seconds: float) -> None:
        """Every request ends, and after a while as many others come."""
        batch_size = len(self._missing)
        self.resize(0)
        self.adaptive.forget_step()
        self.now += seconds
        self.resize(batch_size)

    def run(self, num_steps: int, max_length: int | None = None) -> float:
        """Tokens per second of what was chosen, but for the noise of both."""
        tokens = seconds = 0.0
        for _ in range(num_steps):
            length, took = self._step(max_length)
            tokens += len(self._missing) * expected_tokens(self.chances, length)
            seconds += took
        return tokens / seconds

    def best(self) -> tuple[int, float]:
        """The best length at this batch size, and its tokens per second."""
        batch_size = len(self._missing)
        rates = [
            batch_size * expected_tokens(self.chances, k) / self._seconds(batch_size, k)
            for k in range(len(self.chances) + 1)
        ]
        best = max(range(len(rates)), key=rates.__getitem__)
        return best, rates[best]

    def _step(self, max_length: int | None) -> tuple[int, float]:
        adaptive, batch = self.adaptive, list(self._missing)
        batch_size = len(batch)
        adaptive.acceptance.record(self._outcomes)
        most = len(self.chances) if max_length is None else max_length
        length = adaptive.choose(self.now, batch, True, most)
        self.lengths.append(length)
        took, self._outcomes = self._seconds(batch_size, length), {}
        if length:
            missing = max(self._missing.values())
            adaptive.drafted(batch_size, is_undisturbed=missing == 0)
            took += -(-missing // (len(self.chances) + 1)) * self._append_seconds
            self._outcomes = {each: (length, self._accepted(length)) for each in batch}
        for request, missing in self._missing.items():
            self._missing[request] = 0 if length else missing + 1
        change = self._random.gauss(0, self._drift * (1 - DRIFT_MEMORY**2) ** 0.5)
        self._slowness = DRIFT_MEMORY * self._slowness + change
        noise = self._random.lognormvariate(self._slowness, NOISE)
        is_outlier = self._random.random() < self._outliers
        self._burst_left -= 1
        if self._bursts and self._random.random() < self._bursts:
            self._burst_left = BURST_STEPS
        burst = BURST if self._burst_left > 0 else 1
        first = 1 if (batch_size, length) in self._known else FIRST
        self._known.add((batch_size, length))
        self.now += took * noise * burst * first * (OUTLIER if is_outlier else 1)
        return length, took

    def _accepted(self, length: int) -> int:
        for accepted in range(length):
            if self._random.random() >= self.chances[accepted]:
                return accepted
        return length
