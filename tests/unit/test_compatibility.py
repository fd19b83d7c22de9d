import pytest

from vllm_budgetdraft import __version__
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.vllm_integration.compatibility import check_vllm_version

SKIP = "BUDGETDRAFT_SKIP_VERSION_CHECK"


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SKIP, raising=False)


@pytest.mark.parametrize(
    "version",
    ["0.27.0", "0.31.1", "0.32.0", "0.32.0+cpu", "0.33.0", "0.33.1rc2.dev3+gabcdef"],
)
def test_versions_within_the_range_are_accepted(version):
    check_vllm_version(version)


@pytest.mark.parametrize(
    "version", ["0.26.9", "0.34.0", "0.34.0rc1", "0.3.3", "1.25.0", "dev"]
)
def test_versions_outside_the_range_are_refused_with_both_versions_and_the_remedy(
    version,
):
    with pytest.raises(UnsupportedVllmError) as refusal:
        check_vllm_version(version)
    message = str(refusal.value)
    for part in (f"vLLM {version}", __version__, "0.27 to 0.33", f"{SKIP}=1"):
        assert part in message


def test_the_override_lets_any_version_pass(monkeypatch):
    monkeypatch.setenv(SKIP, "1")
    check_vllm_version("0.34.0")
    check_vllm_version("dev")


def test_an_override_of_zero_is_none(monkeypatch):
    monkeypatch.setenv(SKIP, "0")
    with pytest.raises(UnsupportedVllmError):
        check_vllm_version("0.34.0")
