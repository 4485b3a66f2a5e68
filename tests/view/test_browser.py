"""The page in a browser, driven as a person would: clicks, keys, the wheel; and how fluid it is.

Skipped where there is no Chromium; `CHROMIUM` names one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fuseline.cli.dumping import describe_lowered
from fuseline.cli.graphs import load_program
from fuseline.codegen.lower import lower
from fuseline.compiler.observe import Numerics, Record
from fuseline.compiler.pipeline import Pipeline
from fuseline.view import page_data, render
from tests.helpers.chromium import Browser, chromium, find

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium: apt-get install chromium, or CHROMIUM=PATH")

PIPELINE = "raise,quantize{weights=int8},fuse"
PROBES = Path(__file__).with_name("probes.js")


def write_page(model: str, path: Path, pipeline: str = PIPELINE) -> Path:
    record = Record()
    program, _ = Pipeline(pipeline).run(load_program(model), [Numerics(), record])
    describe_lowered(record.data, lower(program))
    path.write_text(render(page_data(record.data, model)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page("demo:tiny-decoder", tmp_path_factory.mktemp("page") / "index.html").as_uri()


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of nine passes, more than fit beside one another."""
    again = ",raise{allow_empty}" * 3
    pipeline = f"raise{again},quantize{{weights=int8,only=*.gate}},quantize{{weights=int4:g32}}{again}"
    return write_page("demo:tiny-decoder", tmp_path_factory.mktemp("long") / "index.html", pipeline).as_uri()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def load(browser: Browser, url: str) -> None:
    """Opens the page afresh and waits for its first frame."""
    browser.open("about:blank")
    browser.open(url)
    browser.wait("window.fuselineView && fuselineView.frames.drawn > 0")
    browser.run(PROBES.read_text(encoding="utf-8"))


@pytest.fixture
def browser(shared: Browser, page: str) -> Iterator[Browser]:
    shared.problems.clear()
    shared.requests.clear()
    shared.resize(1280, 800)
    load(shared, page)
    yield shared
    assert not shared.problems
    assert [url for url in shared.requests if not url.startswith(("file:", "about:", "data:"))] == []


def state(browser: Browser) -> dict[str, Any]:
    return dict(browser.run("({...fuselineView.app})"))


def data(browser: Browser, path: str) -> Any:
    return browser.run(f"probes.D{path}")


def click_node(browser: Browser, name: str) -> int:
    """Clicks a node of the stage that is shown, by its name; returns its number."""
    found = browser.run(f"probes.node({json.dumps(name)})")
    browser.click_at(found["x"], found["y"])
    return int(found["id"])


def test_from_a_stage_to_a_node_to_its_kernel(browser: Browser) -> None:
    assert [browser.text(f"[data-stage='{i}'] b") for i in range(4)] == [
        "0 captured", "1 raise", "2 quantize", "3 fuse"
    ]  # fmt: skip
    browser.click("[data-stage='1']")
    assert state(browser)["stage"] == 1
    node = click_node(browser, "rms_norm_default")
    assert state(browser)["node"] == node
    panel = browser.text("#details")
    assert "fuseline.rms_norm.default" in panel and "float32[1," in panel
    assert "raise/RMSNorm" in panel and "captured" in panel  # provenance
    assert "h = self.attention_norm(x)" in panel  # the line of code
    assert "became" in panel and "fuse/rms_norm + int8 + linear x3" in panel
    browser.click("#details [data-kernel]")
    assert state(browser)["tab"] == "kernels"
    assert "@triton.jit" in browser.text("#view-kernels pre")
    browser.click("#view-kernels [data-node]")  # the region that launches it
    after = state(browser)
    assert (after["tab"], after["stage"]) == ("graph", 3)
    assert "INSIDE: 7 NODES" in browser.text("#details")
    inner = browser.run(f"probes.D.nodes[probes.D.nodes.find(n => n.id === {after['node']}).region.nodes[0]].id")
    browser.click(f"#details [data-node='{inner}']")
    assert state(browser)["node"] == inner
    assert "in region" in browser.text("#details")


def test_the_diff_of_neighbouring_stages(browser: Browser) -> None:
    browser.click("[data-pass='1']")
    now = state(browser)
    assert (now["stage"], now["diff"]) == (1, True)
    counts = {key: len(data(browser, f".diffs[0].{key}")) for key in ("added", "removed", "rewired")}
    assert counts["added"] == 13 and counts["removed"] > counts["added"]
    for key, count in counts.items():
        assert f"{count} {key}" in browser.text("#details")
    removed = data(browser, ".diffs[0].removed")
    boxes = set(browser.run("fuselineView.graph.placed.boxes.map(box => box.code)"))
    assert boxes & set(removed), "what was removed is drawn among what stayed"
    browser.key("2")
    browser.wait("document.querySelector('.code-line.a') && document.querySelector('.code-line.r')")
    browser.click("#diff")
    assert not state(browser)["diff"]
    assert browser.run("document.querySelectorAll('.code-line.a').length") == 0


def test_groups_open_and_close(browser: Browser) -> None:
    browser.click("[data-stage='0']")
    browser.click("#close-all")
    shut = browser.run("fuselineView.graph.placed.boxes.length")
    found = browser.run("probes.firstShut()")
    assert found["title"] == "layers"
    browser.click_at(found["x"], found["y"], count=2)
    assert browser.run("fuselineView.graph.placed.boxes.length") == shut + 2
    browser.click("#open-all")
    leaves = browser.run("fuselineView.graph.placed.boxes.filter(b => b.code > 0).length")
    assert leaves == data(browser, ".stages[0].layout.groups[0].count")
    assert browser.run("probes.collisions()") == []


def test_keys(browser: Browser) -> None:
    for _ in range(5):
        browser.key("ArrowLeft")
    assert state(browser)["stage"] == 0
    browser.key("ArrowRight")
    assert state(browser)["stage"] == 1
    browser.key("d")
    assert state(browser)["diff"] and browser.run("document.querySelector('#diff').ariaPressed") == "true"
    browser.key("ArrowDown")
    first = state(browser)["node"]
    browser.key("ArrowDown")
    assert first is not None and state(browser)["node"] not in (first, None)
    browser.key("Escape")
    assert state(browser)["node"] is None and state(browser)["diff"]
    browser.key("Escape")
    assert not state(browser)["diff"]
    for position, tab in enumerate(("graph", "code", "passes", "rewrites", "kernels"), 1):
        browser.key(str(position))
        assert browser.run(f"getComputedStyle(document.getElementById('view-{tab}')).display") != "none"
        assert browser.run("document.querySelectorAll('.view.shown').length") == 1
    browser.key("?")
    assert "search" in browser.text("#help")
    browser.key("Escape")
    assert not browser.run("document.getElementById('help').open")


def test_search(browser: Browser) -> None:
    browser.key("/")
    assert browser.run("document.activeElement.id") == "query"
    browser.type("linear layers.1 up")
    names = browser.run("[...document.querySelectorAll('#results li')].map(li => li.innerText)")
    assert names[0].startswith("linear_default_12") and all("layers.1.up" in name for name in names)
    browser.key("Enter")
    chosen = state(browser)["node"]
    assert chosen is not None and browser.run("document.getElementById('results').hidden")
    assert browser.run(f"fuselineView.boxOf({chosen}) !== null")
    browser.key("/")
    browser.type("no such thing")
    assert "nothing in stage" in browser.text("#results")
    browser.key("Escape")
    assert state(browser)["node"] == chosen, "Escape leaves the search alone first"


def test_plots_and_rewrites(browser: Browser) -> None:
    browser.key("3")
    text = browser.text("#view-passes")
    for part in ("Time", "Sites", "Error after each pass", "Live bytes over the schedule", "Rules", "Refused"):
        assert part in text
    errors = [p["error"] for p in data(browser, ".passes")]
    assert len(browser.run("[...document.querySelectorAll('#view-passes circle')].map(c => c.getAttribute('cy'))")) == 4
    assert all(f"{e:.1e}".replace("e-0", "e-") in text for e in errors)
    browser.key("4")
    rows = browser.run("document.querySelectorAll('#view-rewrites tbody tr').length")
    assert rows == len(data(browser, ".actions"))
    browser.click("#view-rewrites .filter")
    browser.type("rotarypair")
    assert browser.run("document.querySelectorAll('#view-rewrites tbody tr').length") == 2
    browser.click("#view-rewrites tbody tr td:first-child a")
    panel = browser.text("#details")
    assert "raise/RotaryPair" in panel and "class " in panel  # the rule's own lines


def test_the_strip_of_memory_chooses_nodes(browser: Browser) -> None:
    where = browser.run("document.querySelector('#memory svg').getBoundingClientRect().toJSON()")
    browser.click_at(where["x"] + where["width"] / 2, where["y"] + where["height"] * 0.7)
    node = state(browser)["node"]
    assert node is not None
    assert "alive" in browser.text("#details")


def test_wheel_and_drag_move_the_camera(browser: Browser) -> None:
    camera = "({...fuselineView.graph.camera})"
    before = browser.run(camera)
    browser.wheel(500, 400, -400)
    zoomed = browser.run(camera)
    assert zoomed["scale"] > before["scale"]
    at = lambda c: ((500 - c["x"]) / c["scale"], (400 - 154 - c["y"]) / c["scale"])
    assert at(zoomed) == pytest.approx(at(before), abs=1), "what is under the mouse stays there"
    browser.drag(500, 400, 60, -40)
    moved = browser.run(camera)
    assert (moved["x"] - zoomed["x"], moved["y"] - zoomed["y"]) == pytest.approx((60, -40))
    assert state(browser)["node"] is None, "a drag is no click"


def test_the_address_keeps_the_view(browser: Browser, page: str) -> None:
    browser.click("[data-stage='2']")
    click_node(browser, "dequantize_default")
    address = browser.run("location.href")
    kept = state(browser)
    load(browser, address)
    assert {k: state(browser)[k] for k in ("stage", "node", "diff")} == {k: kept[k] for k in ("stage", "node", "diff")}


@pytest.mark.parametrize("size", [(1280, 800), (1920, 1080)])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overlaps_or_is_cut(
    browser: Browser, size: tuple[int, int], dark: bool, page: str, long_page: str
) -> None:
    views = ("{stage: 3}", "{stage: 1, diff: true}", "{stage: 2, diff: false, tab: 'kernels'}", "{tab: 'passes'}")
    browser.dark(dark)
    browser.resize(*size)
    for url in (page, long_page):
        load(browser, url)
        assert browser.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
        for view in views:
            browser.run(f"fuselineView.set({view})")
            browser.settle()
            assert browser.run("probes.overflow()") == []
            assert browser.run("probes.overlaps()") == []
            assert browser.run("document.documentElement.scrollWidth") <= size[0]
    browser.dark(False)


@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read(browser: Browser, dark: bool) -> None:
    browser.run(f"document.documentElement.dataset.theme = '{'dark' if dark else 'light'}'")
    assert browser.run("probes.contrast()") == []


@pytest.mark.slow
def test_two_thousand_nodes_stay_fluid(shared: Browser, tmp_path: Path) -> None:
    """SmolLM2, all groups open, near and far: at least 30 frames a second; the first paint within two seconds."""
    path = write_page("demo:smollm2", tmp_path / "index.html")
    assert path.stat().st_size < 10_000_000
    load(shared, path.as_uri())
    assert shared.run("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 2000
    assert shared.run("performance.now()") < 5000
    for change in ("{stage: 0}", "{stage: 1, diff: true}", "{stage: 3, diff: false}"):
        shared.run(f"fuselineView.set({change})")
        shared.run("fuselineView.openAll(true)")
        for zoom in (1, 0.2, None):
            shared.run("fuselineView.fit(true)" if zoom is None else f"(fuselineView.fit(), fuselineView.zoom({zoom}))")
            frames = shared.run("probes.frames(1500)")
            assert frames >= 30, f"{frames:.0f} frames/s at {change}, zoom {zoom}"
    assert not shared.problems
