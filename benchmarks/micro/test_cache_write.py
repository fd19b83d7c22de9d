import pytest

from benchmarks.micro import workloads
from benchmarks.micro.workloads import ON_GPU, SHAPES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 64, 512, 8192] if ON_GPU else [1, 64])
def test_paged_cache_write(bench, device, shape, num_tokens):
    workload = workloads.cache_write(SHAPES[shape], num_tokens, device)
    bench("paged_cache_write", workload, validate=False)
