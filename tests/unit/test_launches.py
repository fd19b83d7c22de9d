"""How many kernels a step of a draft is on a GPU: it takes as long as its launches."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from budgetdraft_kernels import launch_settings
from tests.support.drafting import Requests, build_proposer
from tests.support.launch_count import counted_launches, idle_kernels
from tests.support.models import llama, qwen3, write_model

MOST_OF_A_LAYER = 7
MODELS = {
    "llama": llama,
    "llama_biased": partial(llama, attention_bias=True, mlp_bias=True),
    "qwen3": qwen3,
}


@pytest.fixture(autouse=True)
def h100(monkeypatch) -> None:
    """Attention of one request is split among its multiprocessors, and merged."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    use(monkeypatch, launch_settings.SETTINGS[9, 0], 132)


def use(
    monkeypatch: pytest.MonkeyPatch,
    settings: launch_settings.LaunchSettings,
    multiprocessors: int,
) -> None:
    monkeypatch.setattr(launch_settings, "settings_of", lambda device: settings)
    monkeypatch.setattr(
        launch_settings, "multiprocessors", lambda device: multiprocessors
    )


def of_a_step(
    folder: Path, model: str, num_layers: int, **settings: Any
) -> Counter[str]:
    """What one more draft of one request takes."""
    config = MODELS[model](num_hidden_layers=num_layers)
    proposer = build_proposer(
        write_model(folder / str(num_layers), config),
        attention_backend="triton",
        kv_budget=256,
        num_speculative_tokens=3,
        **{"draft_sample_method": "greedy", **settings},
    )
    is_drawn = proposer.config.draft_sample_method == "probabilistic"
    requests, drafts = Requests(proposer), []
    with idle_kernels():
        requests.start(0, 30)
        for num_drafts in (2, 3):
            with counted_launches() as launches:
                requests.drafts([0], num_drafts, [1.0] if is_drawn else None)
            drafts.append(launches)
    fewer, more = drafts
    return more - fewer


def of_a_layer_and_the_rest(
    folder: Path, model: str = "llama", **settings: Any
) -> tuple[int, int]:
    two, three = (of_a_step(folder, model, n, **settings) for n in (2, 3))
    layer = three - two
    return layer.total(), (two - layer - layer).total()


@pytest.mark.parametrize("position_mode", ["absolute", "cache_relative"])
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_is_seven_kernels_and_the_rest_of_a_step_five(
    model, position_mode, tmp_path
):
    layer, rest = of_a_layer_and_the_rest(tmp_path, model, position_mode=position_mode)
    assert layer == MOST_OF_A_LAYER
    assert rest == 5


def test_attention_that_is_not_split_needs_no_merge(tmp_path, monkeypatch):
    use(monkeypatch, launch_settings.SETTINGS[9, 0], 1)
    assert of_a_layer_and_the_rest(tmp_path) == (6, 5)


def test_a_draw_writes_its_distribution_as_well(tmp_path):
    drawn = of_a_layer_and_the_rest(tmp_path, draft_sample_method="probabilistic")
    assert drawn == (MOST_OF_A_LAYER, 6)


def test_counting_attention_is_six_more(tmp_path):
    counted = of_a_layer_and_the_rest(tmp_path, eviction_policy="heavy_hitter")
    assert counted == (MOST_OF_A_LAYER + 6, 5)


def test_what_pytorch_multiplies_is_a_kernel_for_each_operation(tmp_path, monkeypatch):
    use(monkeypatch, replace(launch_settings.SETTINGS[9, 0], linear_rows=0), 132)
    assert of_a_layer_and_the_rest(tmp_path) == (13, 5)
