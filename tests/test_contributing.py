"""CONTRIBUTING, CHANGELOG and the workflows say what the repository does."""

import re
from pathlib import Path

import pytest
import yaml

import vllm_budgetdraft
from tests import test_import_boundaries as boundaries

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def quoted(names: set[str]) -> list[str]:
    return [f"`{name}`" for name in sorted(names)]


def of_ours(package: str) -> str:
    allowed = boundaries.MAY_IMPORT_OURS[package]
    if allowed == boundaries.EVERYTHING:
        return "everything"
    groups = {"core": boundaries.CORE, "foundation": boundaries.FOUNDATION}
    names = []
    for group, members in groups.items():
        if members <= allowed:
            names.append(group)
            allowed = allowed - members
    return ", ".join(names + quoted(allowed)) or "nothing"


def of_others(package: str) -> str:
    if package in boundaries.MAY_IMPORT_OTHERS:
        return ", ".join(sorted(boundaries.MAY_IMPORT_OTHERS[package]))
    return "anything" + " but vllm" * (package not in boundaries.MAY_IMPORT_VLLM)


def test_the_import_table_is_the_enforced_one() -> None:
    rows: dict[tuple[str, str], list[str]] = {}
    for package in boundaries.MAY_IMPORT_OURS:
        rows.setdefault((of_ours(package), of_others(package)), []).append(package)
    lines = ["| package | of ours | of others |", "|---|---|---|"]
    for (ours, others), packages in rows.items():
        names = ", ".join(f"`{package}`" for package in packages)
        lines.append(f"| {names} | {ours} | {others} |")
    table = "\n".join(lines)
    assert f"\n\n{table}\n\n" in CONTRIBUTING, table


def test_the_groups_of_the_import_table_are_the_enforced_ones() -> None:
    rest = boundaries.CORE - boundaries.FOUNDATION
    assert f"foundation is {', '.join(quoted(boundaries.FOUNDATION))};" in CONTRIBUTING
    assert f"core is foundation, {', '.join(quoted(rest))}." in CONTRIBUTING


def test_what_is_linked_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", CONTRIBUTING)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_named_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", CONTRIBUTING)) <= set(targets)


def test_the_newest_version_in_the_changelog_is_this_one() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+)\] - ", changelog, flags=re.MULTILINE)
    assert versions[0] == vllm_budgetdraft.__version__


@pytest.mark.parametrize(
    ("workflow", "command"),
    [
        ("ci", ".ci/run"),
        ("release", "make test ARGS=tests/test_package.py"),
        ("release", ".venv/bin/python -m build"),
    ],
)
def test_a_workflow_runs_what_it_is_for(workflow: str, command: str) -> None:
    text = (ROOT / f".github/workflows/{workflow}.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert command in [step.get("run") for step in job["steps"]]
