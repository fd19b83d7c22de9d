"""Flex Decoding: drafting along with verification or after it, whichever pays."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from vllm_budgetdraft.proposer.adaptive_length import Acceptance, StepTimes
from vllm_budgetdraft.proposer.step_costs import StepCosts

Mode = Literal["parallel", "sequential"]
MODES: tuple[Mode, ...] = get_args(Mode)
#: In this number of steps, the other mode has this number of steps, one after another.
#: The first of them is not timed, for its drafts were still made in the mode before.
TRIAL_EVERY, TRIAL_STEPS = 150, 3
#: Steps at first in which modes take turns.
NUM_FIRST = 4 * TRIAL_STEPS


class FlexSwitch:
    """Picks the mode with more tokens a second, E(k) / T(B, k), of the next step.

    Both modes have the model of cost that draft lengths are chosen by: T is what was
    timed at start-up, and what steps take beyond it; E is what drafts of that mode were
    accepted. Where mask tokens know the bonus token in one mode alone, E differs.
    """

    def __init__(self, costs: Mapping[Mode, StepCosts]) -> None:
        self._times = {mode: StepTimes(costs[mode]) for mode in MODES}
        self._acceptance = {mode: Acceptance(costs[mode].max_length) for mode in MODES}
        self._num_steps = 0

    def choose(self, requests: Sequence[str], length: int) -> Mode:
        """The mode of the next step, in which these draft up to ``length`` tokens."""
        step, self._num_steps = self._num_steps, self._num_steps + 1
        if step < NUM_FIRST:
            return MODES[step // TRIAL_STEPS % 2]
        best = max(MODES, key=lambda mode: self.rate(mode, requests, length))
        if step % TRIAL_EVERY < TRIAL_STEPS:
            return MODES[1 - MODES.index(best)]
        return best

    def rate(self, mode: Mode, requests: Sequence[str], length: int) -> float:
        """Tokens a second of each request, as far as is known."""
        acceptance = self._acceptance[mode]
        chances = acceptance.chances(requests)[:, :length]
        seconds = self._times[mode].estimate(len(requests))[length]
        return float((1 + chances.mean(0).sum()) / seconds)

    def accepted(
        self,
        mode: Mode,
        requests: Sequence[str],
        outcomes: Mapping[str, tuple[int, int]],
    ) -> None:
        """What became of drafts that a mode made; see ``Acceptance.record``."""
        self._acceptance[mode].forget_all_but(requests)
        self._acceptance[mode].record(outcomes)

    def took(self, mode: Mode, batch_size: int, length: int, seconds: float) -> None:
        """A step of one mode, from its drafts to the next, in which all drafted."""
        self._times[mode].record(batch_size, length, seconds)
