"""What the commands have in common: kinds of options, and how they end."""

import json
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_budgetdraft.errors import BudgetDraftError

#: Of what the system refuses, whose message names it.
REMEDY = "see to that file or folder, its permissions and the disk's space"
#: As shells have it of a program that was interrupted.
INTERRUPTED = 130


@contextmanager
def told(program: str) -> Iterator[None]:
    """Ends the program with one message, no traceback, where a user can mend it.

    The status is 2 then, and 130 where it was interrupted.
    """
    try:
        yield
        return
    except BudgetDraftError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = f"{error}; {REMEDY}", 2
    except KeyboardInterrupt as stop:
        message, status = "; ".join(("interrupted", *map(str, stop.args))), INTERRUPTED
    print(f"{program}: {message}", file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def when_interrupted(advice: Callable[[], str]) -> Iterator[None]:
    """Gives an interruption what a user may do next, for ``told`` to say."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice()) from None


def with_homes(words: list[str]) -> list[str]:
    """Words of a command line, with the home folder for a ``~`` that begins a path."""
    return [
        name + os.path.expanduser(value)
        for name, value in (_split(word) for word in words)
    ]


def _split(word: str) -> tuple[str, str]:
    """``--option=`` or ``task=``, if that is there, and the rest."""
    name = re.match(r"(?:[\w-]+=)?(?=~)", word)
    end = name.end() if name else len(word)
    return word[:end], word[end:]


def json_object(text: str) -> dict[str, Any]:
    """An option whose value is JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ArgumentTypeError(
            f"{text[:100]!r} is no JSON object; write for example "
            '\'{"dtype": "float32"}\''
        )
    return value


def at_least(least: float) -> Callable[[str], Any]:
    """An option whose value is a number from that on, whole where that is."""
    kind = type(least)

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least) - 1
        if not least <= value < float("inf"):
            what = "whole number" if kind is int else "number"
            raise ArgumentTypeError(
                f"{text[:100]!r} is no {what} from {least:g} on; give one"
            )
        return value

    return number
