"""The page: one file with everything in it, loading nothing, and small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import fuseline
from fuseline import Pipeline
from fuseline.compiler.observe import Numerics, Record
from fuseline.view import page_data, render, steps
from fuseline.view.data import both, short_names
from fuseline.view.page import asset, embedded
from tests.helpers.models import Mlp
from tests.view.graphs import node
from tests.view.test_layout import check

ROOT = Path(fuseline.__file__).parent.parent


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    record = Record()
    torch.manual_seed(0)
    program = fuseline.capture(Mlp(), (torch.randn(4, 8),))
    Pipeline("raise,quantize{weights=int8},fuse").run(program, [Numerics(), record])
    return record.data


@pytest.fixture(scope="module")
def page(record: dict[str, Any]) -> str:
    return render(page_data(record, "</script><b>a & b"))


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text, parse_constant=lambda word: pytest.fail(word))


def test_nothing_is_loaded(page: str) -> None:
    without_data = re.sub(r'(<script type="application/json".*?>).*?</script>', r"\1", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,)|url\(|@import|import\(|fetch\(|XMLHttp""", without_data)
    assert set(re.findall(r"https?://[^\"'\s]+", without_data)) <= {"http://www.w3.org/2000/svg"}  # a name, no address
    assert "default-src 'none'" in page


def test_the_data_is_json_and_stands_safely_in_the_page(page: str, record: dict[str, Any]) -> None:
    data = data_of(page)
    assert data["title"] == "</script><b>a & b"
    assert "<title>&lt;/script&gt;&lt;b&gt;a &amp; b – fuseline view</title>" in page
    assert [s["name"] for s in data["stages"]] == [s["name"] for s in record["stages"]]
    assert len(data["diffs"]) == len(data["passes"]) == 3
    assert "{{" not in re.sub(r"<script[\s\S]*", "", page)


def test_names_of_a_model_cannot_break_out() -> None:
    hostile = "</script><!-- \u2028 ${x} {{script}} \\"
    assert json.loads(embedded({"name": hostile})) == {"name": hostile}
    assert not re.search("[<>&\u2028]", embedded({"name": hostile}))


def test_placeholders_in_the_data_are_data(record: dict[str, Any]) -> None:
    page = render(page_data(record, "{{script}}{{data}}"))
    assert data_of(page)["title"] == "{{script}}{{data}}"


def test_every_stage_and_diff_is_laid_out(record: dict[str, Any]) -> None:
    from fuseline.view.changes import stage_states
    from fuseline.view.hierarchy import drawn

    told: list[str] = []
    data = page_data(record, "", step=told.append)
    assert len(told) == steps(record) == 7
    for number, stage in enumerate(data["stages"]):
        check(stage["layout"], drawn(stage_states(record, number), {}))
    for diff in data["diffs"]:
        kids = {kid for group in diff["layout"]["groups"] for kid in group["kids"] if kid > 0}
        changed = {*diff["added"], *diff["removed"]}
        hidden = {s["id"] for s in data["nodes"] if s["op"] == "get_attr" or s["target"] == "getitem" or "region" in s}
        assert changed - hidden <= kids


def test_regions_refer_to_the_states_inside_them(record: dict[str, Any]) -> None:
    data = page_data(record, "")
    regions = [state for state in data["nodes"] if "region" in state]
    assert regions
    for state in regions:
        for position in state["region"]["nodes"]:
            assert data["nodes"][position]["inside"] == state["id"]


def test_what_was_removed_stands_where_it_was() -> None:
    from fuseline.view.changes import changes

    before = [node(1), node(2, [1]), node(3, [2]), node(4, [3]), node(5, [4])]
    after = [node(1), node(6, [1]), node(4, [6]), node(5, [4])]
    merged = both(before, after, changes(before, after))
    assert [s["id"] for s in merged] == [1, 6, 2, 3, 4, 5]
    assert [s["id"] for s in both([node(1), node(2), node(3)], [node(1), node(3)], changes([node(2)], []))] == [1, 2, 3]


def test_files_have_the_shortest_names_that_tell_them_apart() -> None:
    paths = ["/a/models/llama.py", "/b/models/llama.py", "/b/ops.py", "/b/fuse/__init__.py"]
    assert list(short_names(paths).values()) == [
        "a/models/llama.py", "b/models/llama.py", "ops.py", "fuse/__init__.py"
    ]  # fmt: skip


def test_assets_are_package_data() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fuseline"]
    assets = {p for p in (ROOT / "fuseline" / "view" / "assets").iterdir() if p.is_file()}
    packed = {p for pattern in table for p in (ROOT / "fuseline").glob(pattern)}
    assert assets and assets <= packed
    assert all(p.stat().st_size < 20_000 for p in assets)
    assert asset("page.html").startswith("<!doctype html>")


@pytest.mark.slow
def test_a_wheel_has_them(tmp_path: Path) -> None:
    copy = tmp_path / "source"  # a build leaves files where it runs
    shutil.copytree(ROOT / "fuseline", copy / "fuseline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(copy)], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "fuseline" / "view" / "assets").iterdir():
        assert f"fuseline/view/assets/{path.name}" in names


@pytest.mark.slow
def test_the_page_of_a_real_model_is_small() -> None:
    from fuseline.cli.graphs import load_program

    record = Record()
    Pipeline("raise,quantize{weights=int8},fuse").run(load_program("demo:smollm2"), [record])
    assert len(record.data["stages"][0]["nodes"]) > 1900
    assert len(render(page_data(record.data, "demo:smollm2")).encode()) < 10_000_000
