"""How vLLM is changed: its functions are wrapped once, its objects get subclasses."""

import functools
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def is_ours(speculative_config: Any) -> bool:
    """Whether an engine drafts by this package.

    By name, for the class takes long to import, and most processes are not ours.
    """
    return hasattr(speculative_config, "budgetdraft")


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


def specialise(instance: Any, subclass: type) -> None:
    """Makes an object of vLLM's one of a subclass of ours, and changes no other object.

    Args:
        instance: of the class that ``subclass`` derives from, or of another subclass of
            it, whose methods are then called where ours call ``super()``. One of
            another class, a user's own, is left as it is.

    Raises:
        AttributeError: vLLM's class lacks a method that is marked as overriding one.
    """
    (base,) = subclass.__bases__
    kind = type(instance)
    if not isinstance(instance, base) or isinstance(instance, subclass):
        return
    for name, member in vars(subclass).items():
        if getattr(member, "__override__", False):
            getattr(base, name)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    instance.__class__ = type(kind.__name__, (subclass, kind), names)
