"""The documentation says what the code does, and its commands would be accepted."""

import ast
import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.code_blocks import LANGUAGES
from tests.support.pages import BLOCKS, DOCS, PAGES, ROOT, Block, code_blocks, name_of
from vllm_budgetdraft import environment
from vllm_budgetdraft.config import (
    BudgetDraftConfig,
    EvictionSettings,
    RequestSettings,
)
from vllm_budgetdraft.eviction.base import PromptStates, check_selection
from vllm_budgetdraft.eviction.catalogue import POLICIES, make_policy
from vllm_budgetdraft.vllm_integration.compatibility import NEWEST, OLDEST
from vllm_budgetdraft.vllm_integration.metrics import statistics
from vllm_budgetdraft.vllm_integration.patches.table import PATCHES


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_is_what_it_says_it_is(block):
    assert block.language in LANGUAGES, f"{block.place} is {block.language!r}"
    LANGUAGES[block.language](block)


def needs_engine(block: Block) -> bool:
    imports = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(block.text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    return bool(imports & {"vllm", "openai"})


def runnable_pages() -> list[Path]:
    return [
        page
        for page in PAGES
        if any(
            block.language == "python" and not needs_engine(block)
            for block in BLOCKS
            if block.page == page
        )
    ]


@pytest.mark.parametrize("page", runnable_pages(), ids=name_of)
def test_python_without_an_engine_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "page"}
    for block in code_blocks(page):
        if block.language == "python" and not needs_engine(block):
            exec(compile(block.text, block.place, "exec"), names)


def test_the_policy_of_the_page_keeps_what_it_may(tmp_path, monkeypatch):
    (text,) = (
        block.text
        for block in code_blocks(DOCS / "policies.md")
        if "(EvictionPolicy)" in block.text
    )
    (name,) = re.findall(r"^class (\w+)", text, re.MULTILINE)
    (tmp_path / "policy_of_the_page.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    settings = EvictionSettings(eviction_policy=f"policy_of_the_page:{name}")
    policy = make_policy(settings)
    for num_tokens in (5, 64, 100, 1000):
        states = PromptStates(torch.randn(2, 3, num_tokens, 8))
        check_selection(policy.select(states, 64), states, 64)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [*(sys.executable, "-m", "mkdocs"), "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "WARNING" not in said, said
    return folder


def text_of(site: Path, page: str) -> str:
    """What a page of the site says, without its markup."""
    source = (site / page / "index.html").read_text(encoding="utf-8")
    return html.unescape(re.sub(r"<[^>]+>", "", source))


def test_the_configuration_page_has_every_setting(site):
    text = text_of(site, "configuration")
    for name, field in BudgetDraftConfig.model_fields.items():
        assert f"\n{name}: " in text and field.description in text, name
    for name in RequestSettings.model_fields:
        assert name in text
    for variable in re.findall(
        r"BUDGETDRAFT_\w+", Path(environment.__file__).read_text()
    ):
        assert variable in text


def test_the_pages_have_what_is_made_of_the_code(site):
    for name in [
        *statistics.GAUGES,
        *statistics.COUNTERS,
        *statistics.HISTOGRAMS,
    ]:
        assert f"vllm_budgetdraft:{name}" in text_of(site, "metrics")
    internals = text_of(site, "internals")
    for patch in PATCHES:
        assert patch.target.split(":")[1] in internals
    for method in ("_calc_spec_decode_metadata", "make_stats", "take_draft_token_ids"):
        assert method in internals
    assert "match_temperature" in text_of(site, "training")
    assert "--engines-at-once" in text_of(site, "evaluation")


def test_no_page_repeats_the_settings():
    for page in DOCS.rglob("*.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        for name, field in BudgetDraftConfig.model_fields.items():
            described = field.description in text and len(field.description) > 40
            assert not described, f"{name_of(page)} repeats {name}"


def test_every_policy_has_a_section():
    text = (DOCS / "policies.md").read_text(encoding="utf-8")
    for name in POLICIES:
        assert f"\n## `{name}`\n" in text


def test_the_supported_range_is_stated():
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    for page in ("quick-start.md", "limits.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        assert f"{oldest} to {newest}" in " ".join(text.split())
