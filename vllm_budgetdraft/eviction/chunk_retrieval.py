"""The chunks of the prompt that score best: BudgetDraft's policy."""

from types import ModuleType

import torch
from torch import Tensor

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.eviction.base import all_positions, four_dimensions


class ChunkRetrieval:
    """Keeps the first chunk, the best-scoring chunks, and the end of the prompt.

    Based on BudgetDraft (https://arxiv.org/abs/2606.00144), section 3.3, itself after
    TriForce's retrieval cache: chunks of 8 tokens, selected per layer and KV head.
    ``last_key`` is the released code's score, the last cached key against the chunk's
    mean key; ``last_queries`` is the paper's text, the attention weight that the last
    queries give the chunk.

    Deviation: the released code drops the tokens after the last whole chunk and keeps
    nothing recent by rule; here the last ``local_tokens`` and that remainder stay.
    """

    def __init__(self, settings: EvictionSettings, operations: ModuleType) -> None:
        self._chunk_scores = operations.chunk_scores
        self.chunk_size = settings.chunk_size
        self.local_tokens = settings.local_tokens
        self.sink_chunks = -(-settings.sink_tokens // settings.chunk_size)
        by_queries = settings.chunk_score == "last_queries"
        self.observation_tokens = settings.observation_tokens if by_queries else 0

    def select(self, keys: Tensor, queries: Tensor | None, budget: int) -> Tensor:
        num_tokens, size = keys.shape[-2], self.chunk_size
        if num_tokens <= budget:
            return all_positions(keys)
        sinks = self.sink_chunks * size
        # Whole chunks, so that what is left holds the remainder of any length.
        local = min(self.local_tokens, (budget - sinks) // 2) // size * size
        num_chunks = (num_tokens - sinks - local) // size
        end = sinks + num_chunks * size
        num_kept = (budget - sinks - (num_tokens - end)) // size

        by = "mean_key" if queries is None else "attention"
        queries = keys[..., -1:, :] if queries is None else queries
        scores = self._chunk_scores(
            four_dimensions(keys), four_dimensions(queries), size, by
        )
        scores = scores[..., self.sink_chunks : self.sink_chunks + num_chunks]
        scores = scores.view(*keys.shape[:-2], num_chunks)
        best = scores.topk(num_kept, dim=-1, sorted=False).indices.sort(-1).values

        within = torch.arange(size, device=keys.device)
        chosen = (sinks + best[..., None] * size + within).flatten(-2)
        shape = (*keys.shape[:-2], -1)
        first = torch.arange(sinks, device=keys.device).expand(shape)
        last = torch.arange(end, num_tokens, device=keys.device).expand(shape)
        return torch.cat([first, chosen, last], dim=-1)

    def protected_tokens(self, budget: int) -> int:
        return budget
