import pytest

from benchmarks.micro import workloads
from benchmarks.micro.workloads import ON_GPU, SHAPES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 64] if ON_GPU else [1, 8])
def test_linear(bench, device, shape, num_tokens):
    workload = workloads.linear(SHAPES[shape], num_tokens, device)
    bench("linear", workload, validate=False)
