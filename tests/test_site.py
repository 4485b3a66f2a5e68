"""The documentation as a site: every page is placed, every link leads somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fuseline.compiler import registry

ROOT = Path(__file__).resolve().parents[1]
STAGE = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[2])
import importlib.util
spec = importlib.util.spec_from_file_location("docs_site", sys.argv[2] + "/site.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
made.PAGES, made.SITE = pathlib.Path(sys.argv[1]) / "pages", pathlib.Path(sys.argv[1]) / "site"
made.PAGES.parent.mkdir(exist_ok=True)
print(json.dumps({name: [str(p) for p in pages] for name, pages in made.stage().items()}))
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The pages as Markdown, in a process of its own, where no test has registered a pass."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", STAGE, str(folder), str(ROOT / "docs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "pages", json.loads(done.stdout)


@pytest.mark.slow
def test_every_page_has_its_place(staged: tuple[Path, dict[str, list[str]]]) -> None:
    pages, sections = staged
    placed = [page for found in sections.values() for page in found]
    assert sorted(placed) == sorted(map(str, pages.rglob("*.md"))) and len(placed) == len(set(placed))
    assert {"Start", "Guides", "Passes", "Debugger", "Extending", "How it works", "Measured"} <= set(sections)
    assert Path(sections["Start"][0]).name == "index.md"


@pytest.mark.slow
def test_each_pass_has_a_page_with_its_graphs(staged: tuple[Path, dict[str, list[str]]]) -> None:
    pages, _ = staged
    for name, kind in registry.available().items():
        if not kind.__module__.startswith("fuseline."):
            continue
        text = (pages / "passes" / f"{name}.md").read_text(encoding="utf-8")
        assert "## Options" in text and text.count("<svg") == 2 and "No picture: " not in text, name


@pytest.mark.slow
def test_links_between_pages_resolve(staged: tuple[Path, dict[str, list[str]]]) -> None:
    pages, _ = staged
    for page in pages.rglob("*.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("https://", "#")):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
def test_errors_are_indexed(staged: tuple[Path, dict[str, list[str]]]) -> None:
    text = (staged[0] / "errors.md").read_text(encoding="utf-8")
    assert "this model was optimized and never called, so nothing is known of what its graphs read" in text
    assert int(re.search(r"(\d+) messages", text)[1]) > 300


def test_papers_lead_to_files() -> None:
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    row = re.search(r"^\| GPTQ \(Frantar et al\., 2023\) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert "`quantize`" in row[1] and "passes/calibrated/gptq.py" in row[2]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("material") is None, reason="mkdocs is not installed: make docs"
)
def test_the_site_builds_and_loads_nothing_from_elsewhere() -> None:
    """Strictly: a link that leads nowhere is an error."""
    done = subprocess.run([sys.executable, "docs/site.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = ROOT / "build" / "site"
    assert (site / "passes" / "quantize.html").is_file()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(https?://[^\">\s]+)", text)
        assert not [url for url in loaded if "canonical" not in url], f"{page.name} loads {loaded}"
