"""Builds the documentation as a site that asks no network: `make docs`, or

    python docs/site.py            build/site
    python docs/site.py --stage    build/pages alone: the pages as Markdown, with all that is generated

Pages are those of docs/, the README, CONTRIBUTING, the changelog, each example package's README, and what is generated:
a page for each pass, the index of errors. They are found, not listed: a page that SECTIONS does not place goes to
"More", under its first heading.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from error_pages import error_page  # beside this script, whose folder Python looks in first
from pass_pages import pass_pages, title

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
#: What is not in docs/: where it comes from, and what it is called on the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": ("index", "quickstart", "choosing", "tools"),
    "Guides": ("generation", "calibration", "quantization", "rotations", "sparsity", "experts", "qat", "kv-cache",
               "saving", "serving", "long_context", "sequence_parallel", "checkpointing"),
    "Passes": (),
    "Debugger": ("debugging", "cli", "errors"),
    "Extending": ("custom-pass", "contributing"),
    "How it works": ("architecture", "papers"),
    "Measured": ("peers", "benchmarks", "schemes", "families"),
    "Project": ("versions", "changelog", "security"),
}  # fmt: skip
STYLE = """\
.graphs { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.graphs figure { margin: 0; flex: 1 1 18rem; max-width: 100%; }
.graphs svg { height: auto; }
.md-grid { max-width: 80rem; }
.md-typeset table:not([class]) { font-size: .6rem; }
.md-typeset table:not([class]) th { min-width: 0; padding: .6em .8em; }
.md-typeset table:not([class]) td { padding: .5em .8em; }
.md-typeset pre > code { font-size: .64rem; }
"""


def stage() -> dict[str, list[Path]]:
    """Writes build/pages; returns the pages by section."""
    shutil.rmtree(PAGES, ignore_errors=True)
    (PAGES / "passes").mkdir(parents=True)
    sources = {path: path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "passes.md"}
    sources |= {ROOT / name: target for name, target in OUTSIDE.items()}
    sources |= {path: f"{path.parent.name}.md" for path in sorted((ROOT / "examples").glob("*/README.md"))}
    for path, name in sources.items():
        (PAGES / name).write_text(relinked(path, sources), encoding="utf-8")
    for name, text in {**pass_pages(), "errors.md": error_page()}.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", PAGES / "images")
    (PAGES / "site.css").write_text(STYLE, encoding="utf-8")
    return sections()


def sections() -> dict[str, list[Path]]:
    left = {path.stem: path for path in sorted(PAGES.glob("*.md"))}
    found = {name: [left.pop(stem) for stem in stems if stem in left] for name, stems in SECTIONS.items()}
    index = PAGES / "passes" / "index.md"
    found["Passes"] = [index, *sorted(p for p in index.parent.glob("*.md") if p != index)]
    return {name: pages for name, pages in {**found, "More": list(left.values())}.items() if pages}


def relinked(path: Path, sources: dict[Path, str]) -> str:
    """A page with links that lead to where pages are on the site; files that are no page are named, not linked."""

    def link(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if re.match(r"https?:|mailto:|#", target):
            return match[0]
        file, _, anchor = target.partition("#")
        resolved = (path.parent / file).resolve()
        anchor = f"#{anchor}" if anchor else ""
        if resolved == ROOT / "docs" / "passes.md":
            return f"[{text}](passes/index.md)"
        if resolved in sources:
            return f"[{text}]({sources[resolved]}{anchor})"
        if resolved.parent == ROOT / "docs" / "images":
            return f"[{text}](images/{resolved.name})"
        return text if text.startswith("`") else f"{text} (`{resolved.relative_to(ROOT)}`)"

    return re.sub(r"\[(?P<text>[^\]\[]+)\]\((?P<target>[^)\s]+)\)", link, path.read_text(encoding="utf-8"))


def configuration(pages: dict[str, list[Path]]) -> dict[str, Any]:
    """mkdocs.yml as data: no font, script or style is loaded from another host."""
    named = lambda path: {title(path.read_text(encoding="utf-8")): path.relative_to(PAGES).as_posix()}
    return {
        "site_name": "Fuseline",
        "docs_dir": str(PAGES),
        "site_dir": str(SITE),
        "use_directory_urls": False,
        "nav": [{name: [named(page) for page in found]} for name, found in pages.items()],
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.tabs", "toc.integrate", "content.code.copy"],
            "palette": [
                {"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "black"},
                {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "black"},
            ],
        },
        "plugins": ["search"],
        "markdown_extensions": ["tables", "fenced_code", "attr_list", "md_in_html", "toc", "pymdownx.highlight"],
        "extra_css": ["site.css"],
        "extra": {"generator": False},
        "validation": {"links": {"anchors": "warn"}},
    }


def build() -> Path:
    """Builds the site, strictly: a link that leads nowhere is an error."""
    import yaml

    config = ROOT / "build" / "mkdocs.yml"
    pages = stage()
    config.write_text(yaml.safe_dump(configuration(pages), sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--config-file", str(config)]
    subprocess.run(command, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return SITE


if __name__ == "__main__":
    if "--stage" in sys.argv[1:]:
        stage()
        print(f"wrote {PAGES.relative_to(ROOT)}")
    else:
        print(f"wrote {build().relative_to(ROOT)}/index.html")
