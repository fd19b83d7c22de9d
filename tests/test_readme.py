"""README says what the code does."""

from pathlib import Path

from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.eviction.catalogue import POLICIES
from vllm_budgetdraft.vllm_integration.compatibility import NEWEST, OLDEST

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_settings_table_is_the_config() -> None:
    for name, field in BudgetDraftConfig.model_fields.items():
        default = "required" if field.is_required() else f"`{field.default}`"
        assert f"| `{name}` | {default} | {field.description} |" in README


def test_every_policy_is_listed() -> None:
    for name in POLICIES:
        assert f"| `{name}` |" in README


def test_the_supported_range_is_stated() -> None:
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    assert f"{oldest} to {newest}" in README
