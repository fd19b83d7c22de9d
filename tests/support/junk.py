"""Values that nobody foresaw, and how they come into what somebody wrote."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = (
    *(
        0,
        1,
        2,
        3,
        5,
        7,
        16,
        97,
        -1,
        -7,
        2**31,
        2**53 + 1,
        2**63,
        -(2**64),
        10**30,
        10**4000,
    ),
    *(0.0, 0.5, 1.5, -0.0, 1e-320, 1e39, 1e308, float("nan"), float("inf"), -1e-9),
)
WORDS = (
    *("", " ", "512", "-1", "1e3", "true", "null", "None", "auto", "default", "yarn"),
    *("caf\u00e9", "\u2028", "a\0b", "\ud800", "../x", "/etc/passwd", "~", "%s{0}"),
    *("x" * 5000, "os:system", ":", "a:b:c", "[1, 2]", "user", "text", "\n\n`"),
    *("last_key", "keep_all", "num_speculative_tokens", "assistant", "gpt", "w07 w08"),
)


def junk(rng: Random, depth: int = 0) -> Any:
    """A value of any type that JSON has."""
    kind = rng.randrange(4 if depth > 2 else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(WORDS)
    if kind == 3:
        return rng.randint(-3, 300)
    size = rng.choice((0, 1, 2, 3, 40))
    if kind == 4:
        return [junk(rng, depth + 1) for _ in range(size)]
    return {rng.choice(WORDS): junk(rng, depth + 1) for _ in range(size)}


def spoilt(rng: Random, value: Any) -> Any:
    """Something of about that kind: near it, or in its place."""
    ways: list[Callable[[], Any]] = [lambda: junk(rng), lambda: [value]]
    if isinstance(value, bool | int | float):
        ways += [
            *(lambda: str(value), lambda: -value, lambda: float(value)),
            *(lambda: value + rng.choice((-1, 1, 0.5)), lambda: bool(value)),
            lambda: value * rng.choice((2, 10, 10**9, 10**30)),
        ]
    elif isinstance(value, str):
        ways += [
            *(value.upper, lambda: value[:-1], lambda: value + rng.choice(WORDS)),
            lambda: value.replace("_", "-"),
        ]
    elif isinstance(value, list | dict) and value:
        ways += 4 * [lambda: spoilt_inside(rng, value)]
    return rng.choice(ways)()


def spoilt_inside(rng: Random, value: Any) -> Any:
    """A list or an object with one of its items spoilt, lost, doubled or misnamed."""
    if not isinstance(value, list | dict):
        return junk(rng)
    if not value:
        return [junk(rng)] if isinstance(value, list) else {rng.choice(WORDS): 1}
    if isinstance(value, list):
        place = rng.randrange(len(value))
        new = [spoilt(rng, value[place])]
        between = rng.choice((new, new, new, [], 2 * [value[place]]))
        return [*value[:place], *between, *value[place + 1 :]]
    key = rng.choice(list(value))
    others = {name: each for name, each in value.items() if name != key}
    way = rng.randrange(10)
    if way == 0:
        return others
    if way == 1:
        return others | {str(spoilt(rng, key))[:5000]: value[key]}
    if way == 2:
        return value | {rng.choice(WORDS): junk(rng)}
    return others | {key: spoilt(rng, value[key])}


def spoilt_bytes(rng: Random, content: bytes) -> bytes:
    """A file that was cut, overwritten, or is another one."""
    place = rng.randrange(len(content) + 1)
    few = rng.randbytes(rng.randint(1, 9))
    return rng.choice(
        (
            content[:place],
            content[:place] + few + content[place:],
            content[:place] + few + content[place + len(few) :],
            content[place:],
            content.replace(b'"', b"'", 1),
            b"\xff\xfe" + content,
            b"\0" * len(content),
            b"[" * 50_000,
            rng.randbytes(40),
            b"",
        )
    )


def written(value: Any) -> bytes:
    """JSON, with what Python's readers take beyond it: NaN and lone surrogates."""
    return json.dumps(value).encode()
