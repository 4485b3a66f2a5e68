"""`decode.py --all`: its points are runnable commands, what is missing is known, kernels' bytes are the right ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("transformers")

import decode
import decode_quality
import decode_start
import torch
from decoding import everything
from decoding.candidates import candidates, ours
from decoding.kernels import Use, table, used
from decoding.layers import extrapolated, label
from decoding.loop import Loop
from decoding.model import build, drawn
from decoding.options import prompt_length
from decoding.points import COMPILE, FILES, PEERS, POINTS, tried
from decoding.roofline import drawn as plot, kernel_rows, points, roof
from rich.console import Console

PARSERS = {"decode.py": decode.parse, "decode_start.py": decode_start.parse, "decode_quality.py": decode_quality.parse}
FACTS = {"gpu": "NVIDIA H200", "date": "2026-12-02"}


def test_every_point_is_a_command_that_its_script_takes() -> None:
    assert len({point.name for point in POINTS}) == len(POINTS) and set(COMPILE) == set(candidates())
    for point in POINTS:
        for peers in PEERS:
            script, *words = point.command(peers)
            options = PARSERS[script](words)
            assert point.estimate(peers) > 0 and FILES[script]
            if script == "decode.py":
                assert options.only == list(point.candidates(peers)) and options.point == point.name
                assert prompt_length(options) > 900 and set(options.only) <= set(candidates())


def test_the_points_that_the_options_ask_for() -> None:
    asked = lambda *words: everything.chosen(everything.parse(["--device", "cuda", *words]))
    assert [point.name for point in asked()] == [point.name for point in POINTS]
    (short,) = asked("--only", "8b-b16", "--layers", "8", "--candidates", "fuseline-int4")
    assert short.rows("all") == ["8b-b16 fuseline-int4, 4 of 32 layers", "8b-b16 fuseline-int4, 8 of 32 layers"]
    options = decode.parse(short.command("all")[1:])
    assert (options.layers, options.per_layer, options.batch, options.only) == (8, True, 16, ["fuseline-int4"])
    assert short.estimate("all") < POINTS[0].estimate("cheap") < POINTS[0].estimate("all") < 540
    on_cpu = everything.chosen(everything.parse(["--device", "cpu"]))
    assert {point.script for point in on_cpu} == {"decode_quality.py"}
    assert len(everything.chosen(everything.parse(["--device", "cpu", "--model-shape", "tiny"]))) == len(POINTS)
    for words in (["--only", "9b"], ["--candidates", "eagre"], ["--layers", "1"]):
        with pytest.raises(SystemExit):
            everything.parse(words)


def test_what_is_missing_after_a_run_that_was_cut(tmp_path: Path) -> None:
    options = everything.parse(["--device", "cuda", "--resume", "--results", str(tmp_path)])
    sequence = everything.Sequence(options, FACTS, tmp_path, Console(quiet=True))
    one = next(point for point in POINTS if point.name == "1b-1k")
    assert sequence.path("points").name == "2026-12-02-h200-decode-points.json"
    assert sequence.missing(one) == ["1b-1k fuseline-bf16", "1b-1k reduce-overhead"]
    rows = [{"name": "1b-1k fuseline-bf16", "ms": 1.0}, {"name": "1b-1k reduce-overhead", "failed": "out of memory"}]
    older = tmp_path / "2026-12-01-h200-decode-points.json"
    older.write_text(json.dumps({"rows": rows}))
    assert sequence.path("points") == older and sequence.missing(one) == ["1b-1k reduce-overhead"]
    everything.forget(older, ["1b-1k fuseline-bf16"])
    assert [row["name"] for row in everything.read(older)["rows"]] == ["1b-1k reduce-overhead"]
    sequence.options.budget = 0
    sequence.run(one)
    assert "not begun" in sequence.outcomes["1b-1k"]


def test_a_point_that_runs_past_the_budget_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decode.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(everything, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(everything, "LAST", 0.2)
    options = everything.parse(["--device", "cpu", "--budget", "0", "--results", str(tmp_path)])
    sequence = everything.Sequence(options, FACTS, tmp_path, Console(quiet=True))
    assert sequence.process(POINTS[0], tmp_path / "points.json") is None and sequence.left() > -30
    (tmp_path / "decode.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(everything, "LAST", 30.0)
    assert sequence.process(POINTS[0], tmp_path / "points.json") == 3


def test_a_shortened_model_says_so_and_all_layers_lie_on_the_line() -> None:
    name = lambda layers: label("8b-b4", "ours", layers, 32)
    assert name(32) == name(None) == "8b-b4 ours" and name(8) == "8b-b4 ours, 8 of 32 layers"
    rows: list[dict[str, Any]] = [{"name": name(n), "ms": 0.5 + 0.2 * n, "floor_ms": 0.3 + 0.1 * n} for n in (4, 8)]
    extrapolated(rows, "8b-b4", ["ours", "other"], [4, 8], 32)
    assert rows[0].keys() == {"name", "ms", "floor_ms"} and rows[1]["ms"] == pytest.approx(2.1)
    assert rows[1]["layer_ms"] == pytest.approx(0.2) and rows[1]["full_ms"] == pytest.approx(6.9)
    assert rows[1]["full_to_floor"] == pytest.approx(6.9 / 3.5) and "from 4 and 8" in rows[1]["extrapolated"]


@pytest.fixture(scope="module")
def uses() -> dict[str, Use]:
    """Of a step of the tiny model over 21 of 48 positions, which no kernel runs."""
    cpu = torch.device("cpu")
    model = build("tiny", None, cpu, torch.bfloat16)
    ready = ours("raise,fuse", "eager")(model)
    loop = Loop(ready.model, ready.call, drawn(model, 3, 20, cpu), 48)
    with torch.no_grad():
        loop.step()
    return used(ready.compiled(), 21, 48)


def test_bytes_and_flops_of_kernels(uses: dict[str, Use]) -> None:
    batch, hidden, vocabulary = 3, 128, 512
    head = next(use for use in uses.values() if use.serves == "linear" and use.bytes > 2 * hidden * vocabulary)
    assert head.bytes == 2 * (hidden * vocabulary + batch * (hidden + vocabulary))
    assert head.flops == 2 * batch * hidden * vocabulary
    attention = next(use for use in uses.values() if use.serves == "attention" and use.flops)
    heads, keys, width, seen = 4, 2, 32, 21
    assert attention.flops == 4 * batch * heads * width * seen
    assert attention.bytes == 2 * batch * width * (heads + 2 * keys * seen) + batch * seen  # one byte a slot's mask


def test_rows_and_plot_of_the_kernels(uses: dict[str, Use]) -> None:
    name, use = next((n, u) for n, u in uses.items() if u.flops)
    rows = table(
        {
            name: {"count": 16, "us": 64.0},
            "void at::k<1>(int)": {"count": 4, "us": 20.0},
            "void at::k<2>": {"count": 4, "us": 12.0},
        },
        uses,
        8,
    )
    assert [(row["launches"], row["us"]) for row in rows] == [(2, 4), (1, 4)] and rows[1]["kernel"] == "at::k"
    assert rows[0]["gb_s"] == pytest.approx(use.bytes / 4e-6 / 1e9) and "bytes" not in rows[1]
    assert rows[0]["share_of_step"] == pytest.approx(2 / 3)
    assert all("us" not in row for row in table({}, uses, 8))
    record = {"environment": {"gpu": "NVIDIA H200"}, "rates": {"bandwidth": 4e12, "matmul_flop_s": 8e14}}
    step = {"name": "8b-1k ours", "kernel_table": rows, "bandwidth": 2e12}
    kernels = {**record, "rows": kernel_rows({"rows": [step, {"name": "failed"}]})}
    assert kernels["rows"][0]["share"] == pytest.approx(rows[0]["gb_s"] * 1e9 / 2e12)
    ((x, y),) = points(kernels["rows"])["8b-1k ours"]
    assert (x, y) == pytest.approx((use.flops / use.bytes, use.flops / 4e-6 / 1e12))
    assert roof(4e12, 8e14, 1, 1000) == [(1, 4), (200, 800), (1000, 800)] and len(roof(4e12, 8e14, 1, 2)) == 2
    words = {t.text for t in ElementTree.fromstring(plot(kernels)).iter("{http://www.w3.org/2000/svg}text")}
    assert {"8b-1k ours", "measured limits", "FLOPs a byte", "TFLOP/s", "10", "100"} <= words


def test_a_drawn_cache_is_as_random_as_a_computed_one() -> None:
    cpu = torch.device("cpu")
    model = build("tiny", None, cpu, torch.float32)
    states = [drawn(model, 2, 64, cpu) for _ in range(2)]
    assert states[0].length == 64 and torch.equal(states[0].keys[1], states[1].keys[1])
    assert not torch.equal(states[0].keys[0], states[0].values[0]) and states[0].keys[0].shape == (2, 2, 64, 32)
    assert math.isclose(states[0].keys[0].std().item(), 1, abs_tol=0.05)
    assert tried(POINTS[0]).shape == "tiny"
