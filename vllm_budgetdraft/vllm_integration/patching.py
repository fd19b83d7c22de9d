"""How vLLM is patched: around the original, and once."""

import functools
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def wrap_method(owner: Any, name: str, make: Callable[[Function], Function]) -> None:
    """Replaces ``owner.name`` by ``make(original)``; does nothing the second time.

    Another ``make`` may wrap the same attribute once more.

    Args:
        owner: a class or a module.

    Raises:
        AttributeError: ``owner`` has no such attribute.
    """
    original: Any = getattr(owner, name)
    patch = f"{make.__module__}.{make.__qualname__}"
    applied = getattr(original, "_budgetdraft", ())
    if patch in applied:
        return
    replacement: Any = functools.wraps(original)(make(original))
    replacement._budgetdraft = (*applied, patch)
    setattr(owner, name, replacement)
