"""The operations of ``reference`` as Triton kernels, with the same signatures."""

from budgetdraft_kernels.accumulated_attention import accumulated_attention
from budgetdraft_kernels.chunk_scores import chunk_scores
from budgetdraft_kernels.linear import linear
from budgetdraft_kernels.page_compaction import page_compaction
from budgetdraft_kernels.paged_cache_write import paged_cache_write
from budgetdraft_kernels.paged_sparse_attention import paged_sparse_attention
from budgetdraft_kernels.token_picks import greedy_pick, sampled_pick

__all__ = [
    "accumulated_attention",
    "chunk_scores",
    "greedy_pick",
    "sampled_pick",
    "linear",
    "page_compaction",
    "paged_cache_write",
    "paged_sparse_attention",
]
