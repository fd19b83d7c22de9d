"""What MkDocs pages do not say by themselves: tables of the code, files beside docs/.

A line ``<!-- name arguments -->`` of a page becomes what ``GENERATORS[name]`` returns
for the arguments. Links that lead out of docs/ work in the repository as they are; for
the site, the files they name are copied beside the pages.
"""

import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# The modules beside this one, and the package of the pages' own checkout, wherever else
# one is installed. MkDocs takes these back once this file is read.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from generated_options import command_options, protocols, training_options
from generated_settings import environment_variables, request_settings, settings
from generated_vllm import metrics, overrides, patches

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

MARKER = re.compile(r"^<!-- *(\S+)(?: +(.*?))? *-->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()#\s]+)((?:#[^()\s]*)?)\)")
#: What a link to a folder shows, the first of them that is there.
FRONT_PAGES = ("README.md", "report.html")
#: What the site shows of the repository. Of a link to anything else the text is left.
READABLE = {".csv", ".html", ".json", ".jsonl", ".md", ".png", ".svg"}
#: Files of the repository, and pages that include them.
INCLUDED = {
    ROOT / "CHANGELOG.md": DOCS / "changelog.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
}

GENERATORS: dict[str, Callable[..., str]] = {
    "settings": settings,
    "request-settings": request_settings,
    "environment": environment_variables,
    "training-options": training_options,
    "command-options": command_options,
    "protocols": protocols,
    "metrics": metrics,
    "patches": patches,
    "overrides": overrides,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ that pages link to."""
    waiting = [DOCS / page.src_uri for page in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        for path in _linked(waiting.pop()):
            if path in seen or path.is_relative_to(DOCS):
                continue
            seen.add(path)
            files.append(
                File(
                    path.relative_to(ROOT).as_posix(),
                    str(ROOT),
                    config.site_dir,
                    config.use_directory_urls,
                    inclusion=InclusionLevel.NOT_IN_NAV,
                )
            )
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    source = Path(page.file.src_dir or DOCS, page.file.src_uri)
    markdown = relink(markdown, source, page.file.src_uri)
    if not source.is_relative_to(DOCS):
        return markdown
    return MARKER.sub(lambda match: _generated(match, page), markdown)


def _generated(marker: re.Match, page: Page) -> str:
    name, arguments = marker[1], (marker[2] or "").split()
    if name == "include":
        source = ROOT / arguments[0]
        if source not in INCLUDED:
            raise PluginError(f"{arguments[0]} is not in INCLUDED of docs/hooks.py")
        return relink(source.read_text("utf-8"), source, page.file.src_uri)
    if name not in GENERATORS:
        raise PluginError(f"{page.file.src_uri}: nothing generates {marker[0]}")
    return GENERATORS[name](*arguments)


def relink(markdown: str, source: Path, uri: str) -> str:
    """Links of a file of the repository, as a page at ``uri`` of the site has them."""

    def link(match: re.Match) -> str:
        image, text, target, anchor = match.groups()
        path = _named(source, target)
        if path is None:
            return match[0]
        if (shown := _shown(path)) is None:
            return text
        base = DOCS if shown.is_relative_to(DOCS) else ROOT
        there = shown.relative_to(base).as_posix()
        there = posixpath.relpath(there, posixpath.dirname(uri) or ".")
        return f"{image}[{text}]({there}{anchor})"

    return LINK.sub(link, markdown)


def _named(source: Path, link: str) -> Path | None:
    """What a link names; None if that is not in the repository."""
    if ":" in link or link.startswith("/"):
        return None
    path = Path(os.path.normpath(source.parent / link))
    return path if path.exists() and path.is_relative_to(ROOT) else None


def _shown(path: Path) -> Path | None:
    """What the site shows of a file or folder; None for source code."""
    if path.is_dir():
        fronts = [path / name for name in FRONT_PAGES if (path / name).is_file()]
        path = fronts[0] if fronts else path
    path = INCLUDED.get(path, path)
    if path.suffix not in READABLE or path == ROOT / "README.md":
        return None
    return path


def _linked(page: Path) -> Iterator[Path]:
    """What the site shows of what a page links to."""
    included = {there: here for here, there in INCLUDED.items()}
    for source in filter(None, (page, included.get(page))):
        for match in LINK.finditer(source.read_text(encoding="utf-8")):
            path = _named(source, match[3])
            if path and (shown := _shown(path)):
                yield shown
