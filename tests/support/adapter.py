"""An engine's part around the adapter of model runner V1, with no engine."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.drafting import build_proposer
from tests.support.models import VOCAB_SIZE


class Request:
    """vLLM's object for a request; its identity, and what it asks of us, matter.

    Attributes:
        budgetdraft_told: what the scheduler says of it; None if it says nothing.
    """

    prompt_embeds: Any = None
    lora_request: Any = None
    mm_features: tuple[Any, ...] = ()
    budgetdraft_told: Any = None
    num_prompt_tokens = 0
    output_token_ids: Sequence[int] = ()

    def __init__(self, **extra_args: Any) -> None:
        self.sampling_params = SimpleNamespace(
            extra_args=extra_args,
            temperature=0.0,
            top_k=0,
            seed=None,
            structured_outputs=None,
        )


class Engine:
    """Steps of requests whose target emits one token of its own a step.

    Attributes:
        tokens: contexts by request id.
        prefilling: ids of those that do not sample yet.
        waiting: ids of those that are in no batch.
        verified: drafts that the target has seen in this step, by request id.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        from vllm_budgetdraft.vllm_integration.v1.proposer import BudgetDraftProposer

        self.core = build_proposer(folder, **settings)
        self.max_model_len = settings["max_model_len"]
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(settings=self.core.config),
            scheduler_config=SimpleNamespace(max_num_seqs=settings["num_slots"]),
            model_config=SimpleNamespace(
                max_model_len=self.max_model_len, dtype=None, seed=0
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        self.proposer = BudgetDraftProposer(config)
        self.proposer._use(self.core)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.prefilling: set[str] = set()
        self.waiting: set[str] = set()
        self.verified: dict[str, list[int]] = {}

    @property
    def batch(self) -> list[str]:
        return [name for name in self.requests if name not in self.waiting]

    def start(self, name: str, num_tokens: int) -> None:
        self.requests[name] = Request()
        self.tokens[name] = [i * 7 % VOCAB_SIZE for i in range(num_tokens)]

    def finish(self, name: str) -> None:
        del self.requests[name], self.tokens[name]

    def propose(self) -> dict[str, list[int]]:
        """Drafts of the batch."""
        names = self.batch
        lengths = np.array([len(self.tokens[name]) for name in names], dtype=np.int64)
        # What lies beyond a context is anything.
        shape = (len(names), self.max_model_len)
        token_ids = np.full(shape, VOCAB_SIZE - 1, dtype=np.int32)
        for row, name in enumerate(names):
            token_ids[row, : lengths[row]] = self.tokens[name]
        sampled = [[] if name in self.prefilling else [1] for name in names]
        no_tables = SimpleNamespace(block_tables=[])
        rows = SimpleNamespace(
            req_ids=names,
            block_table=no_tables,
            num_computed_tokens_cpu=np.zeros(len(names), dtype=np.int32),
        )
        runner = SimpleNamespace(requests=self.requests, input_batch=rows)
        self.proposer.bind(runner, self.verified)
        drafts = self.proposer.propose(sampled, lengths, token_ids)
        return dict(zip(names, drafts, strict=True))

    def step(self) -> dict[str, list[int]]:
        """Drafts of the batch; then the target's next token follows."""
        drafts = self.propose()
        for name in drafts.keys() - self.prefilling:
            self.tokens[name].append(len(self.tokens[name]) % VOCAB_SIZE)
            state = self.requests[name]
            state.output_token_ids = self.tokens[name][state.num_prompt_tokens :]
        return drafts
