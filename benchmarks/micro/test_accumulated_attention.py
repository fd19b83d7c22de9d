import pytest
import torch

from benchmarks.micro.workloads import ON_GPU, SEED, SHAPES, Workload, normal

PROMPT_TOKENS = [1024, 16384] if ON_GPU else [1024]
QUERY_TOKENS = 1024 if ON_GPU else 64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt_tokens", PROMPT_TOKENS)
def test_accumulated_attention(bench, device, shape, prompt_tokens):
    torch.manual_seed(SEED)
    shape = SHAPES[shape]
    queries = normal(QUERY_TOKENS, shape.num_heads, shape.head_dim, device=device)
    keys = normal(prompt_tokens, shape.num_kv_heads, shape.head_dim, device=device)
    sums_bytes = 4 * shape.num_kv_heads * prompt_tokens  # float32
    moved_bytes = queries.nbytes + keys.nbytes + sums_bytes
    # It computes more than it moves: one input set will do.
    workload = Workload([{"queries": queries, "keys": keys}], moved_bytes)
    bench("accumulated_attention", workload, validate=False)
