"""The exceptions that users see. Each message names the value, limit and remedy."""


class BudgetDraftError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(BudgetDraftError, ValueError):
    """A setting is unknown, impossible, or contradicts another one."""


class UnsupportedDrafterError(BudgetDraftError, ValueError):
    """The drafter's folder is missing, of another family, or of another vocabulary."""


class UnsupportedVllmError(BudgetDraftError, RuntimeError):
    """The installed vLLM, or a mode that it runs in, is not supported."""


class PagePoolExhaustedError(BudgetDraftError, RuntimeError):
    """A request needs pages and none are free."""


class TrainingError(BudgetDraftError, RuntimeError):
    """A training run cannot go on, and not for a fault of its own."""


def short(said: object, longest: int = 200) -> str:
    """What others' errors and values say, as a part of one paragraph."""
    text = " ".join(str(said).encode(errors="backslashreplace").decode().split())
    return text if len(text) <= longest else f"{text[:longest]}..."
