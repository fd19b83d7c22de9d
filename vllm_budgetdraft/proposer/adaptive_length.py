"""The draft length that pays best, learnt from step times and acceptance."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from vllm_budgetdraft.proposer.draft_length import ladder
from vllm_budgetdraft.proposer.step_costs import ByLength, StepCosts

#: Share of the time that trying other lengths than the best may cost.
EXPLORATION = 0.005
#: Last steps of a length whose median is its time, and how many of them still count
#: when it was not chosen for as many steps.
NUM_SAMPLES, NUM_OLD_SAMPLES = 9, 2
#: How much a step of another length says of a length's time, for each token between
#: them; and how many tokens it is from no drafts to some.
LIKENESS, DRAFTING = 0.25, 20
#: Steps after which a time weighs half as much, and as many times as that happens.
HALF_LIFE, MAX_AGE = 64, 20
#: Least share of what was timed without requests that a step is thought to take.
LEAST_SHARE = 0.01
#: Times that a trial is for, and drafting steps after which it ends without them.
TRIAL_SAMPLES, TRIAL_STEPS = 2, 4


class Acceptance:
    """How many tokens a step emits, by draft length."""

    #: Chance that a draft is accepted before any was verified.
    PRIOR = 0.8
    #: What one more step leaves of the weight of those before, and the weight of a
    #: position (in drafts) below which nothing is forgotten.
    MEMORY, MIN_WEIGHT = 0.98, 4.0
    #: The same of a request's own steps; and as if that many drafts of it had been
    #: accepted, and as many as usual, before its first step.
    REQUEST_MEMORY, REQUEST_PRIOR = 0.98, 16.0

    def __init__(self, max_length: int) -> None:
        # As if one draft of every position had been seen.
        self._verified = np.ones(max_length)
        self._accepted = np.full(max_length, self.PRIOR)
        # By request: drafts accepted, and how many of those verified usually are.
        self._requests: dict[str, tuple[float, float]] = {}

    def record(self, outcomes: Mapping[str, tuple[int, int]]) -> None:
        """
        Args:
            outcomes: of each request, how many drafts were verified, and how many of
                them accepted.
        """
        usual = np.concatenate([[0.0], np.cumsum(self._accepted / self._verified)])
        keep = np.where(self._verified > self.MIN_WEIGHT, self.MEMORY, 1.0)
        self._verified *= keep
        self._accepted *= keep
        for request, (verified, accepted) in outcomes.items():
            reached = min(accepted + 1, verified)
            self._verified[:reached] += 1
            self._accepted[:accepted] += 1
            had, expected = self._requests.pop(request, (0.0, 0.0))
            self._requests[request] = (
                self.REQUEST_MEMORY * had + accepted,
                self.REQUEST_MEMORY * expected + float(usual[reached]),
            )

    def forget_all_but(self, requests: Sequence[str]) -> None:
        """Forgets requests that are not of the batch any more."""
        known = self._requests
        self._requests = {each: known[each] for each in requests if each in known}

    def chances(self, requests: Sequence[str]) -> ByLength:
        """[len(requests), max_length], that a draft and all before it are accepted.

        The chance that draft i is accepted if those before it are, a_i, is the usual
        one, times the ratio of the request's accepted drafts to the usual number.
        """
        known = [self._requests.get(request, (0.0, 0.0)) for request in requests]
        had, expected = np.array(known).reshape(-1, 2).T + self.REQUEST_PRIOR
        chances = np.outer(had / expected, self._accepted / self._verified)
        result: ByLength = np.minimum(chances, 1.0).cumprod(1)
        return result


class StepTimes:
    """How long a step takes, by batch size and draft length.

    It is what ``StepCosts`` says and, on top, what steps were seen to take beyond that:
    those of a length, and the more the fewer and the older they are, those of lengths
    beside it. The first step of a batch size and length does not count, for much is
    prepared in it.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._costs_of: dict[int, ByLength] = {}
        self._estimates: dict[int, ByLength] = {}
        self._samples: dict[tuple[int, int], deque[float]] = {}
        # By batch size: medians beyond the costs, of how many steps, and when the last.
        self._beyond: dict[int, tuple[ByLength, ByLength, ByLength]] = {}
        self._num_recorded = 0
        lengths = np.arange(costs.max_length + 1)
        distances = abs(lengths[:, None] - lengths) + DRAFTING * (
            (lengths[:, None] > 0) != (lengths > 0)
        )
        self._likeness: ByLength = LIKENESS**distances

    def record(self, batch_size: int, length: int, seconds: float) -> bool:
        """Learns from a step, and returns whether it counts."""
        key = batch_size, length
        self._num_recorded += 1
        if key not in self._samples:
            self._samples[key] = deque(maxlen=NUM_SAMPLES)
            return False
        samples = self._samples[key]
        costs = self._without_requests(batch_size)
        if batch_size not in self._beyond:
            none = np.zeros((3, len(costs)))
            self._beyond[batch_size] = none[0], none[1], none[2]
        beyond, counts, last = self._beyond[batch_size]
        if self._num_recorded - last[length] > NUM_SAMPLES:
            # The machine may have been slower then, or contexts shorter.
            while len(samples) > NUM_OLD_SAMPLES:
                samples.popleft()
        samples.append(seconds)
        beyond[length] = median_low(samples) - costs[length]
        counts[length], last[length] = len(samples), self._num_recorded
        self._estimates.clear()  # others may be estimated from it
        return True

    def estimate(self, batch_size: int) -> ByLength:
        """Seconds for every length from 0 on, [max_length + 1]."""
        if batch_size not in self._estimates:
            self._estimates[batch_size] = self._estimate(batch_size)
        return self._estimates[batch_size]

    def _without_requests(self, batch_size: int) -> ByLength:
        if batch_size not in self._costs_of:
            self._costs_of[batch_size] = self._costs.by_length(batch_size)
        return self._costs_of[batch_size]

    def _estimate(self, batch_size: int) -> ByLength:
        costs = self._without_requests(batch_size)
        if not self._beyond:
            return costs
        nearest = min(self._beyond, key=lambda size: abs(size - batch_size))
        beyond, counts, last = self._beyond[nearest]
        ages = (self._num_recorded - last) / HALF_LIFE
        weights = self._likeness * counts * 0.5 ** np.minimum(ages, MAX_AGE)
        more = weights @ beyond / weights.sum(1)
        result: ByLength = np.maximum(costs + more, LEAST_SHARE * costs)
        return result


@dataclass
class _Step:
    """From the choice of a length to the next choice."""

    start: float
    requests: Sequence[str]
    is_decoding: bool
    length: int
    chances: ByLength
    num_drafting: int = 0
    is_undisturbed: bool = False


class AdaptiveLength:
    """Chooses the length k with the most tokens per second, E(k) / T(k); or none.

    E is what ``Acceptance`` expects of the requests of the batch, T what ``StepTimes``
    estimates, which learns from steps that did nothing but decode. Other lengths than
    the best are tried as often as a share of ``EXPLORATION`` of the time pays for, of
    which each has the same part. A trial is charged what it took beyond what its tokens
    are worth at the best length, whatever that was for: drafting in vain, or reading
    prompts that nobody had read while there were no drafts.
    """

    def __init__(self, costs: StepCosts, lengths: Sequence[int] | None = None) -> None:
        """
        Args:
            lengths: to choose from, 0 among them; all up to the longest if None.
        """
        longest = costs.max_length
        self.acceptance = Acceptance(longest)
        self.times = StepTimes(costs)
        self._lengths = np.array(range(longest + 1) if lengths is None else lengths)
        self._tried = sorted({0, *ladder(longest)}.intersection(self._lengths.tolist()))
        self._step: _Step | None = None
        self._credit = 0.0
        self._rate = 0.0
        self._costs = costs
        self._trial: int | None = None
        self._num_trial_steps = self._num_trial_samples = 0
        # What trials have cost, by batch size and length.
        self._trial_costs: defaultdict[tuple[int, int], float] = defaultdict(float)

    @property
    def is_trying(self) -> bool:
        """Whether the last choice was not thought to be the best."""
        return self._trial is not None

    def choose(
        self, now: float, requests: Sequence[str], is_decoding: bool, max_length: int
    ) -> int:
        """Ends the step that was chosen for last, and begins the next one.

        Args:
            now: seconds of any clock.
            requests: that sample together, by id; at least one.
            is_decoding: whether none of them is still being prefilled.
            max_length: longest draft allowed.
        """
        self.acceptance.forget_all_but(requests)
        chances = self.acceptance.chances(requests)
        expected = np.concatenate([[1.0], 1 + chances.mean(0).cumsum()])
        if self._step is not None:
            self._end(self._step, now, requests, is_decoding, expected)
        rates = expected / self.times.estimate(len(requests))
        allowed = self._lengths[self._lengths <= max_length]
        best = int(allowed[rates[allowed].argmax()])
        self._rate = float(rates[best])
        if self._trial is None and self._credit > 0:
            self._trial = self._next_trial(len(requests), best)
            self._num_trial_steps = self._num_trial_samples = 0
        length = best if self._trial is None else min(self._trial, max_length)
        self._step = _Step(now, requests, is_decoding, length, chances)
        return length

    def limits(self) -> list[int]:
        """Most drafts of each request of the step that was chosen for last.

        A draft is worth verifying if it is accepted more often than other tokens come
        in the time for it. Nobody is limited in a trial, nor where graphs are of
        batches of one length, nor where nobody would draft.
        """
        assert self._step is not None
        num_requests, length = len(self._step.requests), self._step.length
        if self._costs.are_uniform or self.is_trying or not length:
            return [length] * num_requests
        times = self.times.estimate(num_requests)
        # Of a draft and its verification, as steps are seen to take.
        seen = float(times[length] - times[0]) / (num_requests * length)
        seconds = min(seen, self._costs.token_seconds(num_requests, length))
        price = seconds * num_requests * self._rate
        is_worth = self._step.chances[:, :length] >= price
        result: list[int] = is_worth.sum(1).tolist()
        return result if any(result) else [length] * num_requests

    def restart_step(
        self, now: float, requests: Sequence[str], is_decoding: bool
    ) -> None:
        """Says that the last choice goes on, and is to be timed from now on alone.

        Args:
            now, requests, is_decoding: as given to ``choose``.
        """
        if (step := self._step) is not None:
            step.start, step.requests, step.is_decoding = now, requests, is_decoding

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

    def _next_trial(self, batch_size: int, best: int) -> int:
        """The one whose trials have cost the least."""
        others = [length for length in self._tried if length != best]
        return min(others, key=lambda length: self._trial_costs[batch_size, length])

    def _end(
        self,
        step: _Step,
        now: float,
        requests: Sequence[str],
        is_decoding: bool,
        expected: ByLength,
    ) -> None:
        seconds, batch_size = now - step.start, len(step.requests)
        self._credit += EXPLORATION * seconds
        is_typical = step.length == 0 or (step.num_drafting and step.is_undisturbed)
        is_alone = step.is_decoding and is_decoding and step.requests == requests
        is_timed = bool(is_typical and is_alone) and self.times.record(
            batch_size, step.length, seconds
        )
        if self._trial is not None:
            if not is_alone:  # the target's prefill would have come anyhow
                usual = float(self.times.estimate(batch_size)[step.length])
                seconds = min(seconds, usual)
            cost = max(0.0, seconds - float(expected[step.length]) / self._rate)
            self._credit -= cost
            self._trial_costs[batch_size, self._trial] += cost
            # Where it did nothing yet it waits, for a prompt to be read.
            self._num_trial_steps += bool(step.num_drafting or not step.length)
            self._num_trial_samples += is_timed
            if (
                self._num_trial_samples == TRIAL_SAMPLES
                or self._num_trial_steps == TRIAL_STEPS
            ):
                self._trial = None
