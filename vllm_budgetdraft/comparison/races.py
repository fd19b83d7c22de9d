"""How close the race was where an output differs from plain vLLM's.

In a half precision the target scores one token and several at once by other kernels,
which round in other ways: where two tokens are nearly as good, either may win. A tie
within rounding is a gap of ``TIE_GAP`` or less between their logits, or of one step of
the precision at logits of that size: bfloat16 has no number between 16 and 16.125.
"""

import math
from typing import Any

from vllm_budgetdraft.comparison.methods import PLAIN

TIE_GAP = 0.01
#: Step of a half precision between 1 and 2.
STEPS = {"bfloat16": 2**-7, "float16": 2**-10}


def races_of(
    engine: Any, dtype: str, prompt: list[int], outputs: dict[str, list[int]]
) -> dict[str, dict[str, Any]]:
    """A race for each method whose greedy output differs, by name; see ``race``.

    There are none in float32, where each difference is a fault.

    Args:
        engine: plain vLLM's, which gets a request for each race.
        dtype: that the target computes in.
        outputs: new tokens of each method, plain vLLM among them.
    """
    if dtype not in STEPS:
        return {}
    found = {
        name: race(engine, dtype, prompt, outputs[PLAIN], tokens)
        for name, tokens in outputs.items()
    }
    return {name: each for name, each in found.items() if each}


def race(
    engine: Any, dtype: str, prompt: list[int], expected: list[int], tokens: list[int]
) -> dict[str, Any] | None:
    """The target's own logits where two outputs part; None where they do not.

    ``position`` is that of the new token; ``logits`` are of the target's two best
    tokens and of the two that were chosen, best first; ``gap`` is from the best to the
    lower of those chosen, and a tie where it is not above ``limit``.
    """
    pairs = enumerate(zip(expected, tokens, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), None)
    if position is None:
        return None
    chosen = [expected[position], tokens[position]]
    ranked = engine.logits(prompt + expected[:position], chosen)
    logits = dict(ranked)
    best = ranked[0][1]
    gap = best - min(logits[token] for token in chosen)
    limit = max(TIE_GAP, step_at(best, dtype))
    return {
        "position": position,
        "logits": ranked,
        "plain_token": chosen[0],
        "token": chosen[1],
        "gap": gap,
        "limit": limit,
        "is_tie": gap <= limit,
    }


def step_at(value: float, dtype: str) -> float:
    """Distance of neighbouring numbers of a half precision, at this one."""
    _, exponent = math.frexp(value)  # of a fraction from 0.5 to 1
    return STEPS[dtype] * 2.0 ** (exponent - 1) if value else 0.0


def describe(race: dict[str, Any]) -> str:
    """In words."""
    scores = ", ".join(f"{token}: {logit:.3f}" for token, logit in race["logits"])
    verdict = "a tie" if race["is_tie"] else "NOT a tie"
    return (
        f"new token {race['position']} is {race['token']}, plain vLLM's is "
        f"{race['plain_token']}; the target's logits are {scores}; a gap of "
        f"{race['gap']:.3g} is {verdict} within rounding ({race['limit']:.3g})"
    )
