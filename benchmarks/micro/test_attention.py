import pytest

from benchmarks.micro import workloads
from benchmarks.micro.workloads import ON_GPU, SHAPES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 8, 64, 256] if ON_GPU else [1, 8])
@pytest.mark.parametrize("budget", [512, 2048] if ON_GPU else [256])
def test_paged_sparse_attention(bench, device, shape, batch, budget):
    workload = workloads.attention(SHAPES[shape], batch, budget, device)
    bench("paged_sparse_attention", workload, validate=False)
