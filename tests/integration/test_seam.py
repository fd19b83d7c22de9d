"""What vLLM makes of ``method="budgetdraft"`` before any weights load."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from tests.support.engines import DRAFTER, TARGET
from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.errors import (
    ConfigurationError,
    UnsupportedDrafterError,
    UnsupportedVllmError,
)

pytestmark = pytest.mark.vllm

SETTINGS = {
    "method": "budgetdraft",
    "model": DRAFTER,
    "num_speculative_tokens": 4,
    "kv_budget": 512,
}


def engine_config(settings: dict, **engine_args: object):
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=TARGET, max_model_len=2048, speculative_config=settings, **engine_args
    )
    return args.create_engine_config()


def test_settings_reach_the_config_and_survive_pickling() -> None:
    config = engine_config({**SETTINGS, "eviction_policy": "sink_window"})
    config = pickle.loads(pickle.dumps(config.speculative_config))
    assert config.settings.kv_budget == 512
    assert config.settings.eviction_policy == "sink_window"
    assert config.num_speculative_tokens == 4
    assert "budgetdraft" in repr(config)


def test_keys_with_hyphens_are_keys_with_underscores() -> None:
    settings = {"method": "budgetdraft", "model": DRAFTER, "kv-budget": 128}
    config = engine_config({**settings, "num-speculative-tokens": 2})
    assert config.speculative_config.settings.kv_budget == 128


def test_the_users_dict_is_left_as_it_was() -> None:
    settings = dict(SETTINGS)
    engine_config(settings)
    assert settings == SETTINGS


def test_the_budget_does_not_change_the_hash_of_the_targets_compile_cache() -> None:
    hashes = {
        engine_config({**SETTINGS, "kv_budget": budget}).compute_hash()
        for budget in (256, 512)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["books-9m-drafter", "books-9m-flexdraft"])
def test_what_is_not_set_is_as_the_drafter_was_trained(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the log says so, of what differs as of what was taken."""
    from vllm_budgetdraft.vllm_integration import speculative_config

    folder = tmp_path / "drafter"
    shutil.copytree(Path(DRAFTER).with_name(kind), folder)
    config = json.loads((folder / "config.json").read_text())
    config["budgetdraft"] |= {"local_tokens": 40, "sink_tokens": 5, "chunk_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    told: dict[str, str] = {}
    for level in ("info", "warning"):
        monkeypatch.setattr(
            speculative_config.logger,
            level,
            lambda text, *values, level=level: told.update({level: text % values}),
        )
    settings = {**SETTINGS, "model": str(folder), "sink_tokens": 8}
    found = engine_config(settings).speculative_config.settings
    assert type(found) is SettledConfig
    assert found.drafter_type == ("flexdraft" if "flexdraft" in kind else "decoder")
    assert (found.local_tokens, found.sink_tokens, found.chunk_size) == (40, 8, 4)
    assert "local_tokens=40" in told["info"] and "sink_tokens" not in told["info"]
    assert "sink_tokens=8 (trained with 5)" in told["warning"]


def test_other_methods_are_left_alone() -> None:
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 2,
    }
    assert engine_config(ngram).speculative_config.method == "ngram"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kv_budgte": 64}, ConfigurationError, ("kv_budgte", "64", "kv_budget")),
        (
            {"eviction_policy": "lru"},
            ConfigurationError,
            ("eviction_policy", "lru", "chunk_retrieval", "sink_window", "keep_all"),
        ),
        (
            {"eviction_policy": "no.such:Policy"},
            ConfigurationError,
            ("no.such:Policy", "package.module:Class"),
        ),
        ({"kv_budget": 8}, ConfigurationError, ("kv_budget=8", "16", "raise")),
        (
            {"num_speculative_tokens": 0},
            ConfigurationError,
            ("num_speculative_tokens=0", "1"),
        ),
        (
            {"model": "no/such/folder"},
            UnsupportedDrafterError,
            ("no/such/folder", "config.json"),
        ),
    ],
    ids=["unknown_key", "policy", "own_policy", "budget", "k", "folder"],
)
def test_a_mistake_is_an_error_that_names_key_value_limit_and_remedy(
    changes: dict, error: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        engine_config(SETTINGS | changes)
    for word in words:
        assert word in str(caught.value)


def test_triton_by_name_is_refused_where_it_has_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigurationError, match="attention_backend='triton' needs"):
        engine_config({**SETTINGS, "attention_backend": "triton"})


def changed_drafter(folder: Path, **changes: object) -> dict:
    config = json.loads((Path(DRAFTER) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return SETTINGS | {"model": str(folder)}


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDrafterError, match="vocab_size=4097.*4096"):
        engine_config(changed_drafter(tmp_path, vocab_size=4097))


def test_another_family_is_refused(tmp_path: Path) -> None:
    settings = changed_drafter(tmp_path, architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedDrafterError, match=r"GPT2.*LlamaForCausalLM"):
        engine_config(settings)


def test_pipeline_parallelism_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedVllmError, match="pipeline_parallel_size=2.*drafter"):
        engine_config(SETTINGS, pipeline_parallel_size=2)


def test_a_vllm_out_of_range_is_refused_unless_overridden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.24.0")
    with pytest.raises(UnsupportedVllmError, match=r"0\.24\.0.*0\.27 to 0\.33"):
        engine_config(SETTINGS)
    monkeypatch.setenv("BUDGETDRAFT_SKIP_VERSION_CHECK", "1")
    assert engine_config(SETTINGS).speculative_config.settings.kv_budget == 512
