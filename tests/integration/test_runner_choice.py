"""Which of vLLM's model runners drafts, by what is asked for."""

from types import SimpleNamespace

import pytest

from tests.support.engines import DRAFTER
from vllm_budgetdraft.config import SettledConfig

pytestmark = pytest.mark.vllm


def only_on_v1(
    data_parallel_size: int = 1,
    is_ahead: bool | None = None,
    executor: str | None = None,
    **settings: object,
) -> list[str]:
    from vllm_budgetdraft.vllm_integration import speculative_config

    settings = {"model": DRAFTER, "num_speculative_tokens": 4, **settings}
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(settings=SettledConfig(**settings)),
        parallel_config=SimpleNamespace(
            data_parallel_size=data_parallel_size, distributed_executor_backend=executor
        ),
        scheduler_config=SimpleNamespace(async_scheduling=is_ahead),
    )
    return speculative_config.only_on_v1(config)


@pytest.mark.parametrize(
    ("settings", "feature"),
    [
        (
            {"draft_confidence_threshold": 0.3, "is_ahead": True},
            "draft_confidence_threshold with asynchronous scheduling",
        ),
        (
            {
                "draft_confidence_threshold": 0.3,
                "is_ahead": False,
                "executor": "external_launcher",
            },
            "draft_confidence_threshold with an external launcher",
        ),
        (
            {"adaptive_draft_length": True, "data_parallel_size": 2},
            "adaptive_draft_length with data parallelism",
        ),
    ],
)
def test_what_v2_cannot_do_is_named_and_has_v1_taken(settings, feature):
    assert only_on_v1(**settings) == [f"budgetdraft's {feature}"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adaptive_draft_length": True},
        {"data_parallel_size": 2},
        {"drafter_type": "flexdraft"},
        {"draft_confidence_threshold": 0.3, "is_ahead": False},
    ],
)
def test_v2_does_the_rest(settings):
    assert only_on_v1(**settings) == []


@pytest.mark.parametrize(("version", "is_ahead"), [("0.32.1", False), ("0.33.0", True)])
def test_a_threshold_needs_v1_where_vllm_will_schedule_ahead(
    version, is_ahead, monkeypatch
):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    assert bool(only_on_v1(draft_confidence_threshold=0.3)) == is_ahead


def test_vllm_asks_us_and_other_methods_are_judged_as_before(monkeypatch):
    """The patched method of the class, around one that knows no "custom_class"."""
    from vllm.config import VllmConfig

    from vllm_budgetdraft.vllm_integration.patches import table

    name = "_get_v2_model_runner_unsupported_features"
    theirs = ["speculative method 'custom_class'", "something else"]
    monkeypatch.setattr(VllmConfig, name, lambda self: list(theirs))
    table.apply("plugin")
    settings = SettledConfig(
        model=DRAFTER, num_speculative_tokens=4, draft_confidence_threshold=0.3
    )
    parallel = SimpleNamespace(data_parallel_size=1, distributed_executor_backend=None)
    ours = SimpleNamespace(
        speculative_config=SimpleNamespace(settings=settings, budgetdraft={}),
        parallel_config=parallel,
        scheduler_config=SimpleNamespace(async_scheduling=True),
    )
    others = SimpleNamespace(speculative_config=SimpleNamespace())
    plain = SimpleNamespace(speculative_config=None)
    ask = getattr(VllmConfig, name)
    assert ask(ours) == [
        "something else",
        "budgetdraft's draft_confidence_threshold with asynchronous scheduling",
    ]
    assert ask(others) == ask(plain) == theirs
