"""`fuseline view`: a page of what --dump left, or of a run made for it."""

from __future__ import annotations

import json
import re
import webbrowser
from collections.abc import Callable
from pathlib import Path

import pytest


def data_of(path: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def test_a_dumped_run_becomes_a_page(cli: Callable, tmp_path: Path) -> None:
    run = cli("opt", "demo:tiny-decoder", "-p", "raise,fuse", "--dump", str(tmp_path / "out"))
    assert run.code == 0, run.err
    result = cli("view", str(tmp_path / "out"))
    assert result.code == 0, result.err
    page = tmp_path / "out" / "index.html"
    data = data_of(page)
    assert [s["name"] for s in data["stages"]] == ["captured", "raise", "fuse"]
    assert all((tmp_path / "out" / s["file"]).is_file() for s in data["stages"])
    assert data["passes"][0]["error"] is not None
    regions = {n["target"] for n in data["nodes"] if "region" in n}
    told = {r for k in data["kernels"]["kernels"] for r in k["regions"]}
    assert told and told | {e["region"] for e in data["kernels"]["eager"]} == regions
    assert all("@triton.jit" in k["source"] for k in data["kernels"]["kernels"])
    flat = " ".join(result.out.split())
    assert "3 stages" in flat and f"{len(data['kernels']['kernels'])} kernels" in flat and "without a network" in flat
    assert "fuseline diff" in result.out.rstrip().splitlines()[-1]
    again = cli("opt", "demo:tiny-decoder", "-p", "raise", "--dump", str(tmp_path / "out"))
    assert again.code == 0, "the page is one of the files that a dump may replace"


@pytest.mark.slow
def test_a_measured_run_becomes_a_page(cli: Callable, tmp_path: Path) -> None:
    run = cli("run", "demo:tiny-decoder", "-p", "raise,fuse", "--dump", str(tmp_path / "out"), "--tokens", "0")
    assert run.code == 0, run.err
    assert cli("view", str(tmp_path / "out")).code == 0
    assert data_of(tmp_path / "out" / "index.html")["kernels"]["kernels"]


@pytest.mark.slow
def test_a_model_is_run_for_its_page(cli: Callable, tmp_path: Path) -> None:
    page, told = tmp_path / "page.html", tmp_path / "data.json"
    result = cli("view", "demo:tiny-decoder", "-p", "raise,fuse", "-o", str(page), "--json", str(told))
    assert result.code == 0, result.err
    data = data_of(page)
    assert data == json.loads(told.read_text())
    assert data["kernels"]["kernels"] and data["title"] == "demo:tiny-decoder"
    assert data["captured_error"] > 0


@pytest.mark.slow
def test_a_pipeline_that_fails_leaves_its_page(cli: Callable, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = cli("view", "demo:tiny-decoder", "-p", "raise,quantize{weights=int4:g100}", "-o", str(page))
    assert result.code == 2
    assert "pass 'quantize' matched no site" in result.err
    assert "the page shows how far it came" in result.out
    data = data_of(page)
    assert [s["name"] for s in data["stages"]] == ["captured", "raise"]
    assert not data["ended"] and "matched no site" in data["stopped"]


@pytest.mark.slow
def test_it_opens_in_the_browser(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: bool(opened.append(url)))
    page = tmp_path / "a page.html"
    result = cli("view", "demo:tiny-decoder", "-p", "raise", "-o", str(page), "--open")
    assert opened == [page.as_uri()]
    assert "there is no browser to open it with" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], r"holds no record.json[\s\S]*try: fuseline run MODEL -p PIPELINE --dump"),
        (["EMPTY", "-p", "raise"], r"holds a run already[\s\S]*try: fuseline run MODEL -p \"raise\" --dump"),
        (["no/such/folder"], r"no such folder: no/such/folder[\s\S]*--dump DIR"),
        (["demo:tiny-decoder"], r"no file to write the page of[\s\S]*-o FILE.html"),
        (["demo:tiny-decoder", "-o", "page.txt"], r"does not end in .html[\s\S]*-o page.html"),
        (["demo:tiny-decoder", "-o", "no/such/page.html"], r"no such folder: no/such"),
        (["demo:tiny-decodr", "-o", "page.html"], r"did you mean 'tiny-decoder'"),
    ],
)
def test_mistakes(cli: Callable, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = cli("view", *(str(tmp_path) if a == "EMPTY" else a for a in arguments))
    assert result.code == 2
    assert re.search(message, result.err), result.err
