"""Who may import whom: the table of CONTRIBUTING.md, and what it is for."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS, KERNELS = "vllm_budgetdraft", "budgetdraft_kernels"

FOUNDATION = {
    "command_line",
    "config",
    "environment",
    "errors",
    "files",
    "provenance",
}
#: What each package may import of ours, itself and the version apart.
MAY_IMPORT_OURS = {
    KERNELS: set(),
    "config": FOUNDATION,
    "errors": FOUNDATION,
    "environment": FOUNDATION,
    "command_line": FOUNDATION,
    "files": FOUNDATION,
    "provenance": FOUNDATION,
    "cache": FOUNDATION | {KERNELS},
    "eviction": FOUNDATION | {KERNELS},
    "attention": FOUNDATION | {KERNELS, "cache"},
    "drafter": FOUNDATION | {KERNELS, "cache", "eviction", "attention"},
}
CORE = set(MAY_IMPORT_OURS)
MAY_IMPORT_OURS |= {
    "proposer": CORE,
    "flexdraft": CORE | {"proposer"},
    "conversations": FOUNDATION,
    "training": CORE | {"conversations", "flexdraft", "evaluation"},
    "evaluation": CORE | {"proposer", "flexdraft"},
    "vllm_integration": CORE | {"proposer", "flexdraft"},
}
USER_FACING = (
    "cli",
    "comparison",
    "diagnosis",
    "generation",
    "fetch",
    "pretrained",
    "__main__",
)
EVERYTHING = set(MAY_IMPORT_OURS) | set(USER_FACING)
MAY_IMPORT_OURS |= dict.fromkeys(USER_FACING, EVERYTHING)

#: What each package may import of others, beside the standard library. The rest may
#: import anything but vLLM.
MAY_IMPORT_OTHERS = {
    KERNELS: {"torch", "triton"},
    "config": {"pydantic"},
    "errors": {"pydantic"},
    "environment": {"pydantic"},
    "command_line": {"pydantic"},
    "files": {"pydantic"},
    "provenance": {"pydantic"},
    "cache": {"numpy", "torch"},
    "eviction": {"torch"},
    "attention": {"numpy", "torch", "xformers"},
    "drafter": {"torch", "transformers", "safetensors"},
}
MAY_IMPORT_VLLM = {"vllm_integration", "cli", "comparison", "diagnosis", "generation"}


def source_files() -> list[Path]:
    folders = (ROOT / OURS, ROOT / "kernels")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def package_of(module: str) -> str:
    """Our package that a module is in; "" for vllm_budgetdraft itself."""
    top, _, rest = module.partition(".")
    return KERNELS if top == KERNELS else rest.partition(".")[0]


def module_name(path: Path) -> str:
    source_root = ROOT / "kernels" if KERNELS in path.parts else ROOT
    parts = path.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import, those within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def offence(importer: str, imported: str) -> str | None:
    """Why a package may not import a module, or None if it may."""
    top = imported.partition(".")[0]
    if not top:
        return "imports are absolute here"
    if top in (OURS, KERNELS):
        package = package_of(imported)
        known = package in MAY_IMPORT_OURS
        if package == importer or not known or package in MAY_IMPORT_OURS[importer]:
            return None
        return f"{importer} may import of ours: {sorted(MAY_IMPORT_OURS[importer])}"
    if top in sys.stdlib_module_names:
        return None
    if top == "vllm" and importer not in MAY_IMPORT_VLLM:
        return f"only {sorted(MAY_IMPORT_VLLM)} may import vllm"
    allowed = MAY_IMPORT_OTHERS.get(importer)
    if allowed is not None and top not in allowed:
        return f"{importer} may import of others: {sorted(allowed)}"
    return None


def test_every_package_has_a_place_in_the_table():
    packages = {package_of(module_name(path)) for path in source_files()} - {""}
    assert packages <= set(MAY_IMPORT_OURS), "add it to the table above, in its layer"


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_a_file_imports_only_what_its_layer_may(path):
    importer = package_of(module_name(path))
    offences = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}: {why}"
        for line, imported in imports_of(path)
        if importer and (why := offence(importer, imported))
    ]
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("eviction", "vllm_budgetdraft.cache.page_pool.PagePool"),
        ("cache", "transformers.PretrainedConfig"),
        ("proposer", "vllm.config.VllmConfig"),
        ("proposer", "vllm_budgetdraft.vllm_integration.v1.proposer"),
        ("vllm_integration", "vllm_budgetdraft.training.losses.ce_loss"),
        ("drafter", "vllm_budgetdraft.proposer.draft_proposer"),
        ("config", "torch"),
        (KERNELS, "vllm_budgetdraft.config"),
        ("training", "..drafter.modeling"),
    ],
)
def test_the_table_notices(importer, imported):
    assert offence(importer, imported)


@pytest.mark.parametrize(
    "module",
    [
        OURS,
        f"{OURS}.vllm_integration.plugin",
        f"{OURS}.config",
        f"{OURS}.cli",
        f"{OURS}.fetch",
    ],
)
def test_what_every_vllm_process_loads_loads_nothing_heavy(module):
    heavy = ["torch", "vllm", "transformers", "triton", "numpy"]
    code = (
        f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules]);"
        f"print({module}.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    loaded, file = result.stdout.splitlines()
    assert loaded == ""
    assert Path(file).is_relative_to(ROOT), "another copy was imported"


@pytest.mark.parametrize("folder", ["kernels", "tests/kernels"])
def test_no_package_of_ours_shadows_the_one_named_kernels(folder):
    """``transformers`` imports Hugging Face's ``kernels``, and would get ours."""
    assert not (ROOT / folder / "__init__.py").exists()
