"""The chunks of the prompt that score best: BudgetDraft's policy."""

from types import ModuleType

import torch
from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.eviction.base import (
    EvictionPolicy,
    PromptStates,
    chunk_scores,
)


class ChunkRetrieval(EvictionPolicy):
    """Keeps the sinks' chunks, the best-scoring chunks, and the end of the prompt.

    Based on BudgetDraft (https://arxiv.org/abs/2606.00144), section 3.3, itself after
    TriForce's retrieval cache: chunks of 8 tokens, selected per layer and KV head.
    ``last_key`` is the released code's score, the last cached key against the chunk's
    mean key; ``last_queries`` is the paper's text, the attention weight that the last
    queries give the chunk.

    Deviation: the released code drops the tokens after the last whole chunk and keeps
    nothing recent by rule; here the last ``local_tokens`` and that remainder stay.
    """

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        super().__init__(settings, operations)
        if settings.chunk_score == "last_queries":
            self.observation_tokens = settings.observation_tokens

    def select(self, states: PromptStates, budget: int) -> Tensor:
        keys, num_tokens = states.keys, states.num_tokens
        if num_tokens <= budget:
            return states.all_positions()
        size = self.settings.chunk_size
        sink_chunks = -(-self.settings.sink_tokens // size)
        sinks = sink_chunks * size
        # Whole chunks, so that what is left holds the remainder of any length.
        local = min(self.settings.local_tokens, (budget - sinks) // 2) // size * size
        num_chunks = (num_tokens - sinks - local) // size
        end = sinks + num_chunks * size
        num_kept = (budget - sinks - (num_tokens - end)) // size

        if states.queries is None:
            last = keys[..., None, -1:, :]
            scores = chunk_scores(self.operations, keys, last, size, "mean_key")
        else:
            scores = chunk_scores(
                self.operations, keys, states.queries, size, "attention"
            )
        scores = scores[..., sink_chunks : sink_chunks + num_chunks]
        best = scores.topk(num_kept, dim=-1, sorted=False).indices.sort(-1).values

        within = torch.arange(size, device=keys.device)
        chosen = (sinks + best[..., None] * size + within).flatten(-2)
        first, last = states.positions(0, sinks), states.positions(end, num_tokens)
        return torch.cat([first, chosen, last], dim=-1)
