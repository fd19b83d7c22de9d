"""An engine's part around the adapter of model runner V1, with no engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.drafting import build_proposer


class Request:
    """vLLM's object for a request; little but its identity matters."""

    prompt_embeds = None
    sampling_params = None


class Engine:
    """Steps of requests whose target emits one token of its own a step.

    Attributes:
        tokens: contexts by request id.
        prefilling: ids of those that do not sample yet.
        waiting: ids of those that are in no batch.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        from vllm_budgetdraft.vllm_integration.runner_v1 import BudgetDraftProposer

        self.core = build_proposer(folder, **settings)
        self.max_model_len = settings["max_model_len"]
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(settings=self.core.config),
            scheduler_config=SimpleNamespace(max_num_seqs=settings["num_slots"]),
            model_config=SimpleNamespace(max_model_len=self.max_model_len, dtype=None),
        )
        self.proposer = BudgetDraftProposer(config)
        self.proposer._core = self.core
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.prefilling: set[str] = set()
        self.waiting: set[str] = set()

    def start(self, name: str, num_tokens: int) -> None:
        self.requests[name] = Request()
        self.tokens[name] = [i * 7 % 97 for i in range(num_tokens)]

    def finish(self, name: str) -> None:
        del self.requests[name], self.tokens[name]

    def step(self) -> dict[str, list[int]]:
        """Drafts of the batch; then the target's next token follows."""
        names = [name for name in self.requests if name not in self.waiting]
        lengths = np.array([len(self.tokens[name]) for name in names], dtype=np.int64)
        token_ids = np.zeros((len(names), self.max_model_len), dtype=np.int32)
        for row, name in enumerate(names):
            token_ids[row, : lengths[row]] = self.tokens[name]
        sampled = [[] if name in self.prefilling else [1] for name in names]
        rows = SimpleNamespace(req_ids=names)
        self.proposer.bind(SimpleNamespace(requests=self.requests, input_batch=rows))
        drafts = self.proposer.propose(sampled, lengths, token_ids)
        for name in names:
            if name not in self.prefilling:
                self.tokens[name].append(len(self.tokens[name]) % 97)
        return dict(zip(names, drafts, strict=True))
