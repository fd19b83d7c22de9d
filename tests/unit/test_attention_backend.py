"""Which implementation runs, and that a drafter drafts the same with either."""

import pytest
import torch

from budgetdraft_kernels import reference
from tests.support import models
from tests.support.drafting import Requests, build_proposer
from vllm_budgetdraft.attention.backend import select_operations
from vllm_budgetdraft.errors import ConfigurationError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def fused(monkeypatch):
    fused = pytest.importorskip("budgetdraft_kernels.fused", reason="needs Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return fused


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_torch_by_name_is_the_reference_on_every_device(device, fused):
    assert select_operations("torch", device) is reference


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu(fused, monkeypatch):
    assert select_operations("auto", GPU) is fused
    assert select_operations("triton", GPU) is fused
    assert select_operations("auto", CPU) is reference
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # slow: only if asked for by name
    assert select_operations("auto", CPU) is reference
    assert select_operations("triton", CPU) is fused


def test_triton_by_name_is_refused_where_it_has_no_device(fused):
    with pytest.raises(ConfigurationError, match="needs a GPU.*device is 'cpu'"):
        select_operations("triton", CPU)


def test_without_the_package_auto_is_torch_and_triton_by_name_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert select_operations("auto", GPU) is reference
    with pytest.raises(ConfigurationError, match="triton is not installed"):
        select_operations("triton", GPU)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (models.llama(), {}),
        (
            models.qwen3(attention_bias=True),
            {"eviction_policy": "heavy_hitter", "position_mode": "cache_relative"},
        ),
        (
            models.llama(attention_bias=True, mlp_bias=True),
            {"eviction_policy": "observation_window", "draft_prefill": "streaming"},
        ),
    ],
    ids=["default", "heavy_hitter_relative", "observation_window_streaming"],
)
def test_a_proposer_drafts_the_same_with_either(tmp_path, config, settings):
    pytest.importorskip("triton")
    folder = models.write_model(tmp_path, config)

    def history(backend: str) -> list[dict[int, list[int]]]:
        proposer = build_proposer(
            folder,
            num_slots=2,
            max_model_len=128,
            attention_backend=backend,
            num_speculative_tokens=3,
            kv_budget=40,
            page_size=8,
            recent_window=20,
            draft_prefill_chunk=50,
            **settings,
        )
        requests = Requests(proposer)
        requests.start(0, 70, seed=1)
        requests.start(1, 3, seed=2)
        rounds = []
        for _ in range(14):
            rounds.append(requests.draft([1, 0]))
            for slot, drafts in rounds[-1].items():
                requests.verify(slot, drafts)
        evicted_at_first = 70 - 2 - 40
        assert proposer.cache.num_evicted[0] > evicted_at_first, "no page was evicted"
        return rounds

    assert history("triton") == history("torch")
