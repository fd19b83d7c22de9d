"""An ``EngineProcess`` without a process, to be asked by a comparison."""

from multiprocessing import Pipe
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vllm_budgetdraft.comparison.engine_process import Generation
from vllm_budgetdraft.comparison.room import Memory

NEW_TOKENS = 8


class StubEngine:
    """Answers at once, and remembers who was asked."""

    #: Method, draft length and the prompt's first token of whole requests.
    asked: ClassVar[list[tuple[str, int, int]]] = []
    made: ClassVar[list["StubEngine"]] = []
    #: Methods whose engines die at their start.
    broken: ClassVar[set[str]] = set()
    #: What methods say that do not say what all do.
    outputs: ClassVar[dict[str, list[int]]] = {}
    dtype: ClassVar[str] = "float32"

    def __init__(
        self, engine_args: dict[str, Any], log_file: Path, environment: dict[str, str]
    ) -> None:
        self.engine_args = engine_args
        self.log_file = log_file
        log_file.touch()
        self.environment = environment
        self.config = engine_args.get("speculative_config") or {"method": "vllm"}
        self.connection, other = Pipe()
        other.close()  # readable at once
        self.is_closed = False
        self.races: list[tuple[list[int], list[int]]] = []
        self.made.append(self)

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        """In place of real engines, with attributes of the class as given."""
        from vllm_budgetdraft.comparison import engine_process, measure

        monkeypatch.setattr(engine_process, "EngineProcess", cls)
        monkeypatch.setattr(measure, "PAUSE_SECONDS", 0)
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        memory = Memory("cpu", 2**40, 2**40)
        monkeypatch.setattr(measure, "memory_at_hand", lambda: memory)
        for name, value in ({"asked": [], "made": []} | changes).items():
            monkeypatch.setattr(cls, name, value)

    def wait_until_ready(self) -> None:
        if self.config["method"] in self.broken:
            raise RuntimeError(f"the engine stopped; its log is {self.log_file}")

    def last_words(self, count: int) -> str:
        return "Loading weights"

    def close(self) -> None:
        self.is_closed = True

    def generate(self, prompt: list[int], sampling: dict[str, Any]) -> Generation:
        if sampling["max_tokens"] == NEW_TOKENS:
            length = self.config.get("num_speculative_tokens", 0)
            self.asked.append((self.config["method"], length, prompt[0]))
        tokens = self.outputs.get(self.config["method"], list(range(NEW_TOKENS)))
        return Generation(tokens, "", 2.0, 1.0, 0, [])

    def logits(self, prompt: list[int], tokens: list[int]) -> list[tuple[int, float]]:
        """Of the tokens asked for, the first of which is the best by 0.0625."""
        self.races.append((prompt, tokens))
        return [(tokens[0], 10.0), (tokens[1], 9.9375)]

    def profile(self, prompt: list[int], sampling: dict[str, Any]) -> dict[str, float]:
        return {"draft": 0.1, "verify": 0.2, "rest": 0.3}

    def describe(self) -> dict[str, Any]:
        return {"peak_memory_bytes": 1, "kv_cache_tokens": 1, "dtype": self.dtype}
