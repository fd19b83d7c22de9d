import pytest

from benchmarks.micro import workloads
from benchmarks.micro.workloads import ON_GPU, SHAPES

BATCHES = [1, 8, 64, 256] if ON_GPU else [1, 8]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_pick(bench, device, shape, batch):
    shape = SHAPES[shape]
    workload = workloads.token_picks(shape, batch, device, sampled=False)
    bench("greedy_pick", workload, validate=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_sampled_pick(bench, device, shape, batch):
    shape = SHAPES[shape]
    workload = workloads.token_picks(shape, batch, device, sampled=True)
    bench("sampled_pick", workload, validate=False)
