"""The switch between drafting along with verification and after it."""

from random import Random

import pytest

from vllm_budgetdraft.flexdraft.switch import MODES, FlexSwitch, Mode
from vllm_budgetdraft.proposer.step_costs import StepCosts

K = 4


def costs(target: float, draft: float) -> StepCosts:
    """A pass takes the same for any number of tokens."""
    return StepCosts({1: target, 64: target}, {1: {1: draft}, K: {1: draft}}, K)


def play(
    switch: FlexSwitch,
    seconds: dict[Mode, float],
    chances: dict[Mode, float],
    num_steps: int,
) -> tuple[list[Mode], float, float]:
    """Modes, tokens and seconds of steps of one request."""
    rng, chosen, tokens, spent = Random(0), [], 0.0, 0.0
    mode: Mode = "sequential"
    last: Mode | None = None
    for _ in range(num_steps):
        accepted = 0
        while accepted < K and rng.random() < chances[mode]:
            accepted += 1
        switch.accepted(mode, ["a"], {"a": (K, accepted)})
        took = seconds[mode] * rng.uniform(0.9, 1.1)
        if last == mode:
            switch.took(mode, 1, K, took)
        last, tokens, spent = mode, tokens + accepted + 1, spent + took
        mode = switch.choose(["a"], K)
        chosen.append(mode)
    return chosen, tokens, spent


@pytest.mark.parametrize("better", MODES)
@pytest.mark.parametrize("by", ["time", "acceptance"])
def test_the_mode_with_more_tokens_a_second_is_taken(better, by):
    """And the other one costs three per cent at most, trials included."""
    worse: Mode = MODES[1 - MODES.index(better)]
    seconds: dict[Mode, float] = dict.fromkeys(MODES, 1.0)
    chances: dict[Mode, float] = dict.fromkeys(MODES, 0.5)
    if by == "time":
        seconds[worse] = 1.4
    else:
        chances[worse] = 0.2
    # What was timed at start-up says that the worse one were faster.
    known = {better: costs(1.0, 0.3), worse: costs(1.0, 0.1)}
    switch = FlexSwitch(known)
    chosen, tokens, spent = play(switch, seconds, chances, 3000)
    assert chosen[500:].count(better) > 0.97 * len(chosen[500:])
    _, best, alone = play(
        FlexSwitch(known), dict.fromkeys(MODES, 1.0), dict.fromkeys(MODES, 0.5), 3000
    )
    assert tokens / spent > 0.97 * best / alone


def test_modes_take_turns_at_first():
    switch = FlexSwitch(dict.fromkeys(MODES, costs(1.0, 0.1)))
    first = [switch.choose(["a"], K) for _ in range(12)]
    assert {first.count(mode) for mode in MODES} == {6}
