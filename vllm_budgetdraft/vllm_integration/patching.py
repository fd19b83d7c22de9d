"""How vLLM is patched: one attribute, once, around the original."""

import functools
from collections.abc import Callable
from typing import Any


def wrap_method(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replaces ``owner.name`` by ``make(original)``; does nothing the second time.

    Args:
        owner: a class or a module.

    Raises:
        AttributeError: ``owner`` has no such attribute.
    """
    original: Any = getattr(owner, name)
    if getattr(original, "_budgetdraft", False):
        return
    replacement: Any = functools.wraps(original)(make(original))
    replacement._budgetdraft = True
    setattr(owner, name, replacement)
