"""Which engines start together, what they are told, and what becomes of them."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.engines import DRAFTER, TARGET
from tests.support.stub_engine import NEW_TOKENS, StubEngine
from vllm_budgetdraft.comparison import engines, measure
from vllm_budgetdraft.comparison.methods import PLAIN, Method, all_methods
from vllm_budgetdraft.comparison.prompts import Prompt
from vllm_budgetdraft.comparison.room import (
    GIB,
    Memory,
    ModelSize,
    Need,
    memory_at_hand,
    side_by_side,
)
from vllm_budgetdraft.errors import BudgetDraftError, ConfigurationError

GPU = Memory("cuda", 70 * GIB, 80 * GIB)
CPU = Memory("cpu", 20 * GIB, 24 * GIB)
TARGET_ARGS = {"model": "target", "max_num_seqs": 4, "max_model_len": 3840}


def speculative(method: str) -> dict:
    return {"speculative_config": {"method": method, "model": "drafter"}}


@pytest.fixture
def sizes(monkeypatch):
    """Of a target of 10 GiB, 64 KiB a token, and a drafter of 1 GiB, 16 KiB a token."""
    found = {
        "target": ModelSize(10 * GIB, 2**16, 2**17),
        "drafter": ModelSize(GIB, 2**14, 2**11),
    }
    monkeypatch.setattr(ModelSize, "of", lambda model, dtype: found[model])


def test_the_size_of_a_model_is_that_of_its_tensors(tmp_path):
    config = {
        **{"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 512},
        **{"num_key_value_heads": 2, "max_position_embeddings": 100},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        "weight": torch.zeros(10, 7, dtype=torch.bfloat16),
        "packed": torch.zeros(5, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "consolidated.safetensors")  # the same once more
    kv = 2 * 3 * 2 * 64
    expected = ModelSize(4 * 70 + 5, 4 * kv, 100)
    assert ModelSize.of(str(tmp_path), "float32") == expected
    assert ModelSize.of(str(tmp_path), "float") == expected  # vLLM's other name of it
    assert ModelSize.of(str(tmp_path), "bfloat16").kv_bytes_per_token == 2 * kv
    assert ModelSize.of(str(tmp_path), "auto").weight_bytes == 2 * 70 + 5


def test_a_model_may_have_pytorchs_files_alone(tmp_path):
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for part in ("00001", "00002"):
        (tmp_path / f"pytorch_model-{part}-of-00002.bin").write_bytes(bytes(100))
    (tmp_path / "training_args.bin").write_bytes(bytes(7))
    assert ModelSize.of(str(tmp_path), "float32").weight_bytes == 200


def test_an_engine_needs_weights_cache_and_what_every_engine_takes(sizes):
    tokens = 4 * (3840 + 256)
    cache = int(tokens * 2**16 * 1.1)
    assert Need.of(TARGET_ARGS, GPU) == Need(cache, cache + 13 * GIB)
    ours = Need.of(TARGET_ARGS | speculative("budgetdraft"), GPU)
    assert ours == Need(cache, cache + 14 * GIB + tokens * 2**14)
    shared = int(tokens * (2**16 + 2**14) * 1.1)
    theirs = Need.of(TARGET_ARGS | speculative("draft_model"), GPU)
    assert theirs == Need(shared, shared + 14 * GIB)
    ngram = TARGET_ARGS | {"speculative_config": {"method": "ngram"}}
    assert Need.of(ngram, GPU) == Need.of(TARGET_ARGS, GPU)
    endless = Need.of(TARGET_ARGS | {"max_model_len": None}, GPU)
    assert endless.kv_cache_bytes == int(4 * (2**17 + 256) * 2**16 * 1.1)


def test_on_a_cpu_the_cache_is_what_vllm_is_told(sizes, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert Need.of(TARGET_ARGS, CPU) == Need(2 * GIB, 13 * GIB)
    told = TARGET_ARGS | {"kv_cache_memory_bytes": GIB}
    assert Need.of(told, CPU) == Need(GIB, 12 * GIB)
    assert side_by_side(TARGET_ARGS, CPU) == TARGET_ARGS
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert Need.of(TARGET_ARGS, CPU).kv_cache_bytes == CPU.total_bytes


def test_on_a_gpu_vllm_is_told_its_cache_and_a_share_that_is_free(sizes):
    told = side_by_side(TARGET_ARGS, GPU)
    need = Need.of(TARGET_ARGS, GPU)
    assert told["kv_cache_memory_bytes"] == need.kv_cache_bytes
    # Which vLLM compares with what is free beside its own CUDA context.
    assert told["gpu_memory_utilization"] * GPU.total_bytes < GIB
    assert told.items() >= TARGET_ARGS.items()


def test_what_a_user_says_of_memory_stays_and_counts(sizes):
    mine = {"kv_cache_memory_bytes": 7 * GIB, "gpu_memory_utilization": 0.5}
    told = side_by_side(TARGET_ARGS | mine, GPU)
    assert told == TARGET_ARGS | mine
    assert Need.of(told, GPU) == Need(7 * GIB, 40 * GIB)
    # A share that is smaller than the need does not make it smaller.
    need = Need.of(TARGET_ARGS | {"gpu_memory_utilization": 0.01}, GPU)
    assert need == Need.of(TARGET_ARGS, GPU)


def test_memory_is_that_of_the_machine():
    memory = memory_at_hand()
    assert memory.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert 2**28 < memory.free_bytes <= memory.total_bytes


METHODS = all_methods(
    ["ngram"], drafter="", lengths=[1, 2, 3, 4, 5], budgets=[], policies=[]
)


@pytest.mark.parametrize(
    ("free", "at_once", "expected"),
    [
        (100, 2, [2, 2, 1]),
        (100, 9, [5]),
        (6, 9, [5]),
        (5, 9, [4, 1]),
        (4, 9, [3, 2]),
        (2, 4, [1, 1, 1, 1, 1]),
    ],
)
def test_groups_hold_so_many_engines_beside_plain_vllm_as_fit(free, at_once, expected):
    groups = engines.groups_that_fit(METHODS, [1] * 6, free, at_once)
    assert [len(group) - 1 for group in groups] == expected
    assert all(group[0].name == PLAIN for group in groups)
    assert [method for group in groups for method in group[1:]] == METHODS[1:]


def test_groups_fit_whatever_their_engines_need():
    groups = engines.groups_that_fit(METHODS, [1, 1, 4, 1, 1, 1], 5, 9)
    assert [len(group) - 1 for group in groups] == [1, 1, 1, 1, 1]
    assert engines.groups_that_fit(METHODS[:1], [9], 5, 2) == [METHODS[:1]]


def test_what_has_no_room_for_two_is_refused_with_the_numbers():
    with pytest.raises(ConfigurationError) as refused:
        engines.groups_that_fit(METHODS[:2], [2 * GIB, 3 * GIB], 4 * GIB, 2)
    said = str(refused.value)
    assert "vllm and ngram k=1 side by side need about 5.0 GiB, and 4.0 GiB" in said
    assert "kv_cache_memory_bytes" in said


def test_without_room_one_goes_after_the_other_and_that_is_said(sizes):
    methods = [Method(PLAIN), Method("budgetdraft", engine_args=speculative("b"))]
    said: list[str] = []
    groups = engines.together_or_in_turn(methods, TARGET_ARGS, GPU, said.append)
    assert groups == [methods] and not said
    small = Memory("cuda", 25 * GIB, 80 * GIB)
    groups = engines.together_or_in_turn(methods, TARGET_ARGS, small, said.append)
    assert groups == [[methods[1]], [methods[0]]]
    assert "one engine after the other" in said[0] and "25.0 GiB are free" in said[0]


def test_each_engine_is_named_as_it_becomes_ready(sizes, monkeypatch):
    StubEngine.install(monkeypatch)
    said: list[str] = []
    with engines.running(METHODS[:3], TARGET_ARGS, GPU, said.append) as found:
        assert list(found) == ["vllm", "ngram k=1", "ngram k=2"]
        assert all("kv_cache_memory_bytes" in e.engine_args for e in found.values())
        assert not any(engine.is_closed for engine in found.values())
    assert all(engine.is_closed for engine in StubEngine.made)
    assert sorted(line.split(" is ready after ")[0] for line in said) == sorted(found)
    # One alone keeps what vLLM takes by itself.
    with engines.running(METHODS[:1], TARGET_ARGS, GPU, said.append) as found:
        assert found["vllm"].engine_args == TARGET_ARGS


@pytest.mark.parametrize(("memory", "expected"), [(CPU, [1, 3, 3]), (GPU, [3, 3, 3])])
def test_on_a_cpu_the_others_start_when_the_first_has_compiled(
    memory, expected, sizes, monkeypatch
):
    StubEngine.install(monkeypatch)
    started: list[int] = []
    monkeypatch.setattr(
        StubEngine, "wait_until_ready", lambda _: started.append(len(StubEngine.made))
    )
    with engines.running(METHODS[:3], TARGET_ARGS, memory, lambda line: None) as found:
        assert list(found) == ["vllm", "ngram k=1", "ngram k=2"]
    assert started == expected


@pytest.mark.parametrize(("device", "expected"), [("cpu", [8]), ("cuda", [8, 9])])
def test_each_length_is_warmed_up_where_code_is_made_for_it(
    device, expected, sizes, monkeypatch, tmp_path
):
    StubEngine.install(monkeypatch)
    memory = Memory(device, 100 * GIB, 100 * GIB)
    monkeypatch.setattr(measure, "memory_at_hand", lambda: memory)
    lengths: list[int] = []
    monkeypatch.setattr(
        measure,
        "warm_up",
        lambda each, prompt, _: lengths.append(len(prompt.token_ids)),
    )
    prompts = [Prompt("books", n, i, [1] * n) for n in (8, 9) for i in range(2)]
    measure.measure(
        METHODS[:2],
        prompts,
        TARGET_ARGS,
        measure.RoundsFile(tmp_path / "rounds.jsonl"),
        new_tokens=NEW_TOKENS,
        temperatures=[0.0],
        engines_at_once=1,
    )
    assert lengths == expected


def test_on_a_cpu_compiled_code_comes_from_the_cache_that_works(monkeypatch):
    StubEngine.install(monkeypatch)
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    for memory, told, expected in (
        (GPU, None, None),
        (CPU, None, "0"),
        (CPU, "1", "1"),
    ):
        if told:
            monkeypatch.setenv("VLLM_USE_AOT_COMPILE", told)
        with engines.running(METHODS[:1], TARGET_ARGS, memory, print) as found:
            assert found["vllm"].environment.get("VLLM_USE_AOT_COMPILE") == expected


def test_an_engine_that_dies_is_named_and_the_others_are_closed(
    sizes, monkeypatch, tmp_path
):
    StubEngine.install(monkeypatch, broken={"ngram"})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(BudgetDraftError, match="ngram k=1 did not start: the") as failed,
        engines.running(METHODS[:2], TARGET_ARGS, GPU, lambda line: None),
    ):
        pass
    assert len(StubEngine.made) == 2
    assert all(engine.is_closed for engine in StubEngine.made)
    (log,) = re.findall(r"its log is (\S+)", str(failed.value))
    assert Path(log).is_file()
    (folder,) = tmp_path.iterdir()
    with engines.running(METHODS[:1], TARGET_ARGS, GPU, lambda line: None):
        pass
    assert list(tmp_path.iterdir()) == [folder]


def test_the_models_of_this_repository_have_their_sizes():
    for model, parameters in ((TARGET, 8_936_000), (DRAFTER, 1_464_000)):
        size = ModelSize.of(model, "float32").weight_bytes
        assert size == pytest.approx(4 * parameters, rel=0.01)
