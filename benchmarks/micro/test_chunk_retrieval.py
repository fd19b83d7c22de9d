import pytest

from benchmarks.micro import workloads
from benchmarks.micro.workloads import ON_GPU, SHAPES

PROMPT_TOKENS = [1024, 16384, 131072] if ON_GPU else [1024]
NUM_KEPT = 512


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt_tokens", PROMPT_TOKENS)
@pytest.mark.parametrize("score", ["mean_key", "attention"])
def test_chunk_scores(bench, device, shape, prompt_tokens, score):
    workload = workloads.chunk_scores(SHAPES[shape], prompt_tokens, device)
    bench("chunk_scores", workload, score=score)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt_tokens", PROMPT_TOKENS)
def test_page_compaction(bench, device, shape, prompt_tokens):
    workload = workloads.page_compaction(SHAPES[shape], prompt_tokens, NUM_KEPT, device)
    bench("page_compaction", workload, validate=False)
