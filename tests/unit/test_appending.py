"""Tokens that came without drafts, and drafts of fewer tokens."""

from random import Random

import pytest
import torch

from tests.support.drafting import Requests, build_proposer, held_by, is_greedy
from tests.support.models import VOCAB_SIZE
from tests.support.policies import EVERY_SECOND
from tests.support.slow_twin import SlowTwin

PROMPT_TOKENS = [2, 3, 17, 150]


class Appending(Requests):
    """Requests whose target now and then goes on without drafts.

    Attributes:
        missing: by slot, the context tokens that the cache lacks, less the last two.
        fed: calls of ``append`` by slot, of positions from start to stop.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.missing: dict[int, range] = {}
        self.fed: list[tuple[int, range]] = []

    def skip(self, slot: int, count: int, num_cached: int) -> None:
        """So many tokens come without drafts."""
        self.contexts[slot] += self.random_tokens(slot, count)
        self.missing[slot] = range(num_cached, len(self.contexts[slot]) - 2)

    def random_tokens(self, slot: int, count: int) -> list[int]:
        return [self._random[slot].randrange(VOCAB_SIZE) for _ in range(count)]

    def catch_up(self, rng: Random) -> None:
        """In calls of any width, for any of the slots that lack as many."""
        while behind := [slot for slot, each in self.missing.items() if len(each)]:
            widest = min(self.proposer.max_append, len(self.missing[rng.choice(behind)]))
            width = rng.randint(1, widest)
            able = [slot for slot in behind if len(self.missing[slot]) >= width]
            starts = {
                slot: self.missing[slot].start
                for slot in rng.sample(able, rng.randint(1, len(able)))
            }
            self.append(starts, width)
            for slot, start in starts.items():
                self.fed.append((slot, range(start, start + width)))
                self.missing[slot] = self.missing[slot][width:]
