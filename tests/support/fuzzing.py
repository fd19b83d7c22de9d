"""Cases by seeds: a sample always, and the others where slow tests run."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Any

import pytest

from vllm_budgetdraft.errors import BudgetDraftError

#: Of each kind of thing; a part of them in one test.
CASES, SAMPLE, PART = 2000, 50, 100
#: Seconds that one may take.
LONGEST = 5.0

parts = pytest.mark.parametrize(
    "seeds",
    [
        range(SAMPLE),
        *(
            pytest.param(range(first, first + PART), marks=pytest.mark.slow)
            for first in range(0, CASES, PART)
        ),
    ],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop}",
)


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(seeds: range, case: Callable[[Random, list[Any]], None]) -> None:
    """Every case; fails with all that went wrong, by their seeds."""
    wrong = []
    for seed in seeds:
        told: list[Any] = []
        try:
            with no_longer_than(LONGEST):
                case(Random(seed), told)
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {str(error)[:200]}"
            wrong.append(f"seed {seed}, {str(told)[:300]}: {what}")
    if wrong:
        pytest.fail(f"{len(wrong)} of {seeds}:\n" + "\n".join(wrong), pytrace=False)


def check_message(error: BudgetDraftError, *names: str) -> None:
    """One paragraph, of a length that can be read, which names what is wrong."""
    message = str(error)
    blank = [line for line in message.splitlines() if not line.strip()]
    assert not blank, f"several paragraphs: {message}"
    message.encode()  # as logs and servers do
    assert 0 < len(message) < 3000, f"{len(message)} characters: {message}"
    assert any(name in message for name in names), f"names nothing: {message}"
