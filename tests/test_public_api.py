"""The names that users and other packages rely on."""

import importlib
import tomllib
from pathlib import Path

import pytest

import vllm_budgetdraft.errors

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = [
    "config:BudgetDraftConfig",
    "config:EvictionSettings",
    "config:parse_request_settings",
    "config:parse_speculative_config",
    "drafter.checkpoint:load_drafter",
    "drafter.checkpoint:save_drafter",
    "drafter.modeling:Drafter",
    "errors:BudgetDraftError",
    "errors:ConfigurationError",
    "errors:PagePoolExhaustedError",
    "errors:UnsupportedDrafterError",
    "errors:UnsupportedVllmError",
    "eviction.base:EvictionPolicy",
    "eviction.base:PromptStates",
    "eviction.catalogue:make_policy",
    "proposer.draft_proposer:DraftProposer",
    "proposer.memory:MemoryPlan",
]


def find(name: str):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_documented(name):
    thing = find(f"vllm_budgetdraft.{name}")
    assert thing.__doc__ and thing.__doc__.strip()


@pytest.mark.parametrize("error", [n for n in PUBLIC if n.startswith("errors:")])
def test_every_error_can_be_caught_as_one_of_ours(error):
    assert issubclass(
        find(f"vllm_budgetdraft.{error}"), vllm_budgetdraft.errors.BudgetDraftError
    )


def entry_points() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["scripts"], *project["entry-points"].values()]
    return [target for group in groups for target in group.values()]


@pytest.mark.parametrize("target", entry_points())
def test_an_entry_point_leads_to_a_function(target):
    assert callable(find(target))


def test_the_version_of_the_package_is_the_one_it_is_built_with():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    module, _, attribute = build["dynamic"]["version"]["attr"].rpartition(".")
    assert find(f"{module}:{attribute}") == vllm_budgetdraft.__version__
