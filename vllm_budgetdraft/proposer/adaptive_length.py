"""The draft length that pays best, learnt from step times and acceptance."""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from vllm_budgetdraft.proposer.draft_length import ladder

#: Share of the time that trying other lengths than the best may cost.
EXPLORATION = 0.005
#: Steps without drafts that a batch size far from all others begins with.
FIRST_STEPS = 3
#: Last steps of a length whose median is its time, and how many of them still count
#: when it was not chosen for as many steps.
NUM_SAMPLES, NUM_OLD_SAMPLES = 9, 2
#: Drafting steps after which a trial ends though none of them could be timed.
TRIAL_STEPS = 3


class Acceptance:
    """How many tokens a step emits, by draft length."""

    #: What one more step leaves of the weight of those before, and the weight of a
    #: position (in drafts) below which nothing is forgotten.
    MEMORY, MIN_WEIGHT = 0.98, 4.0

    def __init__(self, max_length: int) -> None:
        # As if one draft of every position had been seen, and accepted.
        self._verified = [1.0] * max_length
        self._accepted = [1.0] * max_length

    def record(self, outcomes: list[tuple[int, int]]) -> None:
        """
        Args:
            outcomes: of each request, how many drafts were verified, and how many of
                them accepted.
        """
        for position, weight in enumerate(self._verified):
            if weight > self.MIN_WEIGHT:
                self._verified[position] *= self.MEMORY
                self._accepted[position] *= self.MEMORY
        for verified, accepted in outcomes:
            for position in range(min(accepted + 1, verified)):
                self._verified[position] += 1
                self._accepted[position] += position < accepted

    def expected_tokens(self, max_length: int) -> list[float]:
        """E(0) to E(max_length): 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k.

        a_i is the chance that draft i is accepted if those before it are.
        """
        expected = [1.0]
        chance = 1.0
        for verified, accepted in zip(
            self._verified[:max_length], self._accepted[:max_length], strict=True
        ):
            chance *= accepted / verified
            expected.append(expected[-1] + chance)
        return expected


class StepTimes:
    """How long a step takes, by batch size and draft length."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._medians: dict[int, dict[int, float]] = {}
        self._num_recorded = 0
        self._last: dict[tuple[int, int], int] = {}

    def record(self, batch_size: int, length: int, seconds: float) -> None:
        key = batch_size, length
        samples = self._samples.setdefault(key, deque(maxlen=NUM_SAMPLES))
        self._num_recorded += 1
        if self._num_recorded - self._last.get(key, 0) > NUM_SAMPLES:
            # The machine may have been slower then, or contexts shorter.
            while len(samples) > NUM_OLD_SAMPLES:
                samples.popleft()
        self._last[key] = self._num_recorded
        samples.append(seconds)
        self._medians.setdefault(batch_size, {})[length] = median_low(samples)

    def knows_about(self, batch_size: int) -> bool:
        """Whether a batch size not far from this one was timed with and without."""
        return any(
            size <= 2 * batch_size <= 4 * size and _is_complete(known)
            for size, known in self._medians.items()
        )

    def estimate(self, batch_size: int, max_length: int) -> list[float] | None:
        """Seconds for length 0 to ``max_length``.

        What is between two lengths that were timed is interpolated. A batch size that
        was not timed both with and without drafts is like the nearest one that was,
        times a factor if one of its lengths was timed.

        Returns:
            None if no batch size was timed with and without drafts.
        """
        known = self._medians.get(batch_size, {})
        if _is_complete(known):
            return _interpolate(known, max_length)
        for size in sorted(self._medians, key=lambda size: abs(size - batch_size)):
            nearest = self._medians[size]
            if _is_complete(nearest):
                like = _interpolate(nearest, max([max_length, *known]))
                factors = [seconds / like[length] for length, seconds in known.items()]
                factor = median(factors) if factors else 1.0
                return [factor * seconds for seconds in like[: max_length + 1]]
        return None


@dataclass
class _Step:
    """From the choice of a length to the next choice."""

    start: float
    batch: Hashable
    batch_size: int
    length: int
    num_drafting: int = 0
    is_undisturbed: bool = False


class AdaptiveLength:
    """Chooses the length k with the most tokens per second, E(k) / T(k); or none.

    E is what ``Acceptance`` expects, T what ``StepTimes`` measured at this batch size,
    in steps that did nothing but decode. What it costs: a batch size far from all that
    are known begins with ``FIRST_STEPS`` without drafts, and later lengths are tried as
    often as a share of ``EXPLORATION`` of the time pays for, of which each has the
    same part. A trial is charged what it took beyond what its tokens are worth at the
    best length, whatever that was for: drafting in vain, or reading prompts that nobody
    had read while there were no drafts.
    """

    def __init__(self, max_length: int, lengths: Sequence[int] | None = None) -> None:
        """
        Args:
            lengths: to choose from, 0 among them; all up to ``max_length`` if None.
        """
        self.acceptance = Acceptance(max_length)
        self.times = StepTimes()
        self._max_length = max_length
        self._lengths = range(max_length + 1) if lengths is None else lengths
        self._num_first: dict[int, int] = {}
        self._step: _Step | None = None
        self._credit = 0.0
        self._trial: int | None = None
        self._num_trial_steps = 0
        # What trials have cost, by batch size and length.
        self._costs: defaultdict[tuple[int, int], float] = defaultdict(float)

    @property
    def is_trying(self) -> bool:
        """Whether the last choice was not thought to be the best."""
        return self._trial is not None

    def choose(
        self, now: float, batch: Hashable, batch_size: int, max_length: int
    ) -> int:
        """Ends the step that was chosen for last, and begins the next one.

        Args:
            now: seconds of any clock.
            batch: what tells requests that decode together from others; None if one of
                them is still being prefilled.
            max_length: longest draft allowed.
        """
        if self._step is not None:
            self._end(self._step, now, batch)
        length = min(self._choose(batch, batch_size, max_length), max_length)
        self._step = _Step(now, batch, batch_size, length)
        return length

    def restart_step(self, now: float, batch: Hashable) -> None:
        """Says that the last choice goes on, and is to be timed from now on alone.

        Args:
            now, batch: as given to ``choose``.
        """
        if self._step is not None:
            self._step.start, self._step.batch = now, batch

    def forget_step(self) -> None:
        """Says that nobody knows when the last step ended: its requests are over."""
        self._step = None

    def drafted(self, num_requests: int, is_undisturbed: bool) -> None:
        """What became of the last choice.

        Args:
            num_requests: those that drafted.
            is_undisturbed: whether nobody who may draft did not, and none had to read.
        """
        assert self._step is not None
        self._step.num_drafting = num_requests
        self._step.is_undisturbed = is_undisturbed

    def _choose(self, batch: Hashable, batch_size: int, max_length: int) -> int:
        if self._trial is not None:
            return self._trial
        if batch is not None and not self.times.knows_about(batch_size):
            num_first = self._num_first.get(batch_size, 0)
            if num_first < FIRST_STEPS:
                self._num_first[batch_size] = num_first + 1
                return 0
        best, rate = self._best(batch_size, max_length)
        if rate and self._credit > 0:
            self._trial, self._num_trial_steps = self._next_trial(batch_size, best), 0
            return self._trial
        return best

    def _best(self, batch_size: int, max_length: int) -> tuple[int, float]:
        """The best length, and its tokens per second of each request; 0 if unknown."""
        seconds = self.times.estimate(batch_size, max_length)
        if seconds is None:
            return max(k for k in self._lengths if k <= max_length), 0.0
        expected = self.acceptance.expected_tokens(max_length)
        rates = [e / s for e, s in zip(expected, seconds, strict=True)]
        lengths = [length for length in self._lengths if length <= max_length]
        best = max(lengths, key=rates.__getitem__)
        return best, rates[best]

    def _next_trial(self, batch_size: int, best: int) -> int:
        """The one whose trials have cost the least."""
        tried = {0, *ladder(self._max_length)}.intersection(self._lengths)
        others = [length for length in sorted(tried) if length != best]
        return min(others, key=lambda length: self._costs[batch_size, length])

    def _end(self, step: _Step, now: float, batch: Hashable) -> None:
        seconds = now - step.start
        self._credit += EXPLORATION * seconds
        is_typical = step.length == 0 or (step.num_drafting and step.is_undisturbed)
        is_timed = is_typical and batch is not None and step.batch == batch
        if is_timed:
            self.times.record(step.batch_size, step.length, seconds)
        if self._trial is not None:
            _, rate = self._best(step.batch_size, self._max_length)
            tokens = self.acceptance.expected_tokens(step.length)[-1]
            cost = max(0.0, seconds - tokens / rate) if rate else 0.0
            self._credit -= cost
            self._costs[step.batch_size, self._trial] += cost
            # Where it did nothing yet it waits, for a prompt to be read.
            self._num_trial_steps += bool(step.num_drafting or not step.length)
            if is_timed or self._num_trial_steps == TRIAL_STEPS:
                self._trial = None


def _is_complete(known: dict[int, float]) -> bool:
    return 0 in known and len(known) > 1


def _interpolate(known: dict[int, float], max_length: int) -> list[float]:
    """0 to ``max_length``, straight between neighbours and on beyond the last two."""
    lengths = sorted(known)
    result = []
    for length in range(max_length + 1):
        index = min(bisect_left(lengths, length, 1), len(lengths) - 1)
        before, after = lengths[index - 1 : index + 1]
        slope = (known[after] - known[before]) / (after - before)
        if length > after:  # where noise must not promise the impossible
            slope = max(slope, 0.0)
        result.append(known[after] + slope * (length - after))
    return result
