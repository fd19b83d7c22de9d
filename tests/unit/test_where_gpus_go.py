"""Small things that are done on a GPU alone, done on a CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import launch_settings
from tests.support.fake_gpu import cpus_are_gpus
from vllm_budgetdraft.attention.backend import default_device
from vllm_budgetdraft.comparison.methods import Method, default_kinds
from vllm_budgetdraft.comparison.notes import Circumstances, notes
from vllm_budgetdraft.comparison.room import Memory, memory_at_hand
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.diagnosis import env
from vllm_budgetdraft.proposer.memory import resolve_dtype

GPU = torch.device("cuda")
H100 = SimpleNamespace(multi_processor_count=132, total_memory=80 * 2**30)


@pytest.fixture
def h100(monkeypatch) -> pytest.MonkeyPatch:
    """What torch says of one."""
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "NVIDIA H100",
        "get_device_capability": (9, 0),
        "get_device_properties": H100,
        "max_memory_allocated": 3 * 2**30,
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return monkeypatch


def test_a_machine_with_a_gpu_has_that_for_its_device(h100):
    assert default_device() == GPU
    h100.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_engines_share_the_memory_of_the_gpu(h100):
    h100.setattr(torch.cuda, "mem_get_info", lambda: (70, 80))
    assert memory_at_hand() == Memory("cuda", free_bytes=70, total_bytes=80)


def test_kernels_are_cut_as_was_chosen_for_the_gpu(h100):
    settings_of = launch_settings.settings_of.__wrapped__
    assert settings_of(GPU) is launch_settings.SETTINGS[9, 0]
    assert launch_settings.multiprocessors.__wrapped__(GPU) == 132
    h100.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert settings_of(GPU) is launch_settings.DEFAULT


def test_drafters_have_the_targets_type_on_a_gpu():
    config = BudgetDraftConfig(model="-", num_speculative_tokens=1)
    assert resolve_dtype(config, "cuda", torch.bfloat16) is torch.bfloat16
    assert resolve_dtype(config, "cpu", torch.bfloat16) is torch.float32
    config = config.model_copy(update={"draft_dtype": "float16"})
    assert resolve_dtype(config, "cuda", torch.bfloat16) is torch.float16


def test_env_names_the_gpu_and_what_runs_on_it(h100):
    pytest.importorskip("triton")
    said = env._gpu("an H100")
    assert said == "1 x NVIDIA H100, compute capability 9.0, 80 GiB"
    assert env._backend() == "triton, for there is a GPU"


def test_plain_vllm_is_measured_without_its_head_start_where_it_has_one(h100):
    assert "vllm_sync" in default_kinds("models/books-9m-drafter")
    h100.setattr(torch.cuda, "is_available", lambda: False)
    assert "vllm_sync" not in default_kinds("models/books-9m-drafter")


def test_results_of_a_gpu_do_not_speak_of_cpus(h100):
    run = Circumstances(
        methods=[Method("vllm"), Method("ngram", 4)],
        tasks=["chat"],
        temperatures=[0.0, 1.0],
        chat_template=None,
        cost_padded=None,
        enforce_eager=False,
    )
    assert "CPU" not in " ".join(notes(run))
    h100.setattr(torch.cuda, "is_available", lambda: False)
    said = " ".join(notes(run))
    assert "Measured on a CPU" in said and "under speculation: ngram are" in said


@pytest.mark.vllm
def test_an_engine_says_what_it_took_of_the_gpu(h100):
    from vllm_budgetdraft.comparison import engine_process

    waited = []
    h100.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    engine_process._when_idle()
    assert waited == [True]
    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=10, block_size=16),
        scheduler_config=SimpleNamespace(async_scheduling=True),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=config),
        collective_rpc=lambda function: function(SimpleNamespace(model_runner=[])),
    )
    assert engine_process._describe(llm)["peak_memory_bytes"] == 3 * 2**30


def attention(cache: Tensor) -> SimpleNamespace:
    """A layer of vLLM's, on a GPU."""
    size = cache.shape[-1] if cache.ndim == 5 else cache.shape[-1] // 2
    return SimpleNamespace(kv_cache=cache, head_size=size, kv_cache_dtype="auto")


NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM = 5, 16, 2, 8
PAGES = (NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
#: How vLLM lays out keys and values on a GPU, made of pages as they are wanted.
LAYOUTS = {
    "stacked": lambda k, v: torch.stack([k, v]),
    "paired": lambda k, v: torch.stack([k, v], 1),
    "joined": lambda k, v: torch.cat([k, v], -1).transpose(1, 2),
}


@pytest.mark.vllm
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_targets_cache_is_read_in_every_layout_of_a_gpu(layout):
    from vllm_budgetdraft.vllm_integration.target_cache import pages_of

    keys, values = torch.randn(PAGES), torch.randn(PAGES)
    cache = layout(keys, values)
    with cpus_are_gpus():
        found = pages_of(attention(cache))
    torch.testing.assert_close(found, (keys, values))
    addresses = {x.untyped_storage().data_ptr() for x in (*found, cache)}
    assert len(addresses) == 1, "a copy, which would grow old"
