"""`fuseline diff`: what is printed, as data and as a page, and its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_model_is_the_same_as_itself(cli: Callable) -> None:
    result = cli("diff", "demo:tiny-decoder", "demo:tiny-decoder")
    assert result.code == 0, result.err
    assert result.out.startswith("the same program: ")


def test_before_and_after_a_pipeline(cli: Callable, tmp_path: Path) -> None:
    html, data = tmp_path / "diff.html", tmp_path / "diff.json"
    arguments = ("demo:tiny-decoder", "-p", "quantize{weights=int8}", "--html", str(html), "--json", str(data))
    result = cli("diff", *arguments, "--context", "1")
    assert result.code == 1, result.err
    lines = result.out.splitlines()
    assert lines[:2] == ["--- demo:tiny-decoder", "+++ demo:tiny-decoder after quantize{weights=int8}"]
    assert any(line.startswith("+ dequantize") and "by quantize/linear" in line for line in lines)
    assert any(line.startswith("@@ ") and "decoder.py:" in line for line in lines)
    assert lines[-1].startswith("next: fuseline diff") or lines[-1].startswith("  fuseline diff")
    assert "\x1b[" not in result.out, "no colour in a pipe"
    record = json.loads(data.read_text())
    assert record["same"] is False and record["counts"]["replaced"] == 14
    assert record["html"] == str(html) and html.read_text().startswith("<!doctype html>")
    assert "layers.1.down" in {c["module"] for c in record["changes"]}
    assert all(c["line"] for c in record["changes"])


def test_counts_alone(cli: Callable) -> None:
    result = cli("diff", "demo:tiny-decoder", "-p", "quantize{weights=int8}", "--stat")
    assert result.code == 1
    assert "fuseline.dequantize" in result.out and not any(line.startswith("+ ") for line in result.out.splitlines())
    assert max(map(len, result.out.splitlines()[:-1])) <= 80


def test_what_only_moved(cli: Callable) -> None:
    result = cli("diff", "demo:tiny-decoder", "-p", "fuse", "--provenance")
    assert result.code == 1 and "regions added: " in result.out
    assert "made by: - → fuse/" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo:tiny-decoder",), "a comparison needs a second program"),
        (("demo:tiny-decoder", "demo:tiny-decoder", "-p", "raise"), "a comparison needs a second program"),
        (("demo:tiny-decodr", "demo:tiny-decoder"), "did you mean 'tiny-decoder'"),
        (("demo:tiny-decoder", "-p", "rais"), "did you mean 'raise'"),
        (("demo:tiny-decoder", "-p", "raise", "--html", "/nowhere/at/all.html"), "no such folder"),
    ],
)
def test_mistakes(cli: Callable, arguments: tuple[str, ...], message: str) -> None:
    result = cli("diff", *arguments)
    assert result.code == 2 and message in result.err


def test_dumped_stages(cli: Callable, tmp_path: Path) -> None:
    arguments = ("-p", "raise", "--dump", str(tmp_path / "out"), "-o", str(tmp_path / "raised.py"))
    assert cli("opt", "demo:tiny-decoder", *arguments).code == 0
    first, second = sorted((tmp_path / "out").glob("0*.py"))
    same = cli("diff", "demo:tiny-decoder", str(first))
    assert same.code == 0, same.out + same.err
    result = cli("diff", str(first), str(second), "--json", "-")
    assert result.code == 1, result.err
    assert json.loads(result.out)["counts"]["replaced"] > 0


@pytest.mark.slow
def test_colour_on_a_terminal(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = cli("diff", "demo:tiny-decoder", "-p", "quantize{weights=int8}").out.splitlines()
    assert any(line.startswith("\x1b[32m+ ") for line in lines) and any(line.startswith("\x1b[31m- ") for line in lines)


DRIVE = """
<script>
const count = () => rows.filter(r => !r.matches('.filtered')).length;
const said = [rows.length, count()];
document.querySelector('input[data-kind=added]').click(); said.push(count());
document.querySelector('input[data-kind=added]').click(); said.push(count());
const words = document.getElementById('words');
words.value = 'layers.1.down'; words.dispatchEvent(new Event('input')); said.push(count());
words.value = ''; words.dispatchEvent(new Event('input'));
document.dispatchEvent(new KeyboardEvent('keydown', {key: 'n'}));
document.dispatchEvent(new KeyboardEvent('keydown', {key: 'n'}));
said.push(rows.indexOf(document.querySelector('tr.current')));
const folds = document.querySelectorAll('tr.fold').length, hidden = document.querySelectorAll('tr.hidden').length;
document.querySelector('tr.fold').click();
said.push(folds - document.querySelectorAll('tr.fold').length);
said.push(hidden > document.querySelectorAll('tr.hidden').length);
document.title = 'said ' + said.join(' ');
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
@pytest.mark.slow
def test_the_page_in_a_browser(cli: Callable, tmp_path: Path) -> None:
    """Kinds and words filter the changes, n goes to the next one, a click opens what is folded."""
    html, data = tmp_path / "diff.html", tmp_path / "diff.json"
    cli("diff", "demo:tiny-decoder", "-p", "quantize{weights=int8}", "--html", str(html), "--json", str(data))
    html.write_text(html.read_text().replace("</body>", f"{DRIVE}</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", html.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = dom.split("<title>")[1].split("</title>")[0]
    counts = json.loads(data.read_text())["counts"]
    total = sum(counts.values())
    shown = [total, total, total - counts["added"], total, title.split()[5], 1, 1, "true"]
    assert title == f"said {' '.join(map(str, shown))}" and 1 <= int(title.split()[5]) < total
