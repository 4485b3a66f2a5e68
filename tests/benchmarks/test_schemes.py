"""The table of schemes in its small form: rows, resuming, the page."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import schemes
import torch
import torch.nn.functional as F
from compared.score import Judge
from compared.settings import settings

from fuseline import Pipeline
from fuseline.compiler.recipes import recipes

WORDS = "--device cpu --model demo:tiny-llama --tokens 128 --calibration 128 --length 32 --peers --json"


def test_scores_are_what_they_say() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 20, (2, 8), generator=draw) for _ in range(2)]
    tables = [torch.randn(20, 20, generator=draw) for _ in range(2)]
    judge = Judge(lambda x: tables[0][x], ids)
    score = judge(lambda x: tables[1][x])
    p, q = (F.log_softmax(torch.cat([t[x] for x in ids]).double(), -1) for t in tables)
    whole = torch.cat(ids)
    kl = (p.exp() * (p - q)).sum(-1)
    assert score.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert score.kl_by == pytest.approx([float(kl[:, i : i + 2].mean()) for i in range(0, 8, 2)], rel=1e-5)
    assert score.loss == pytest.approx(
        float(F.cross_entropy(q[:, :-1].flatten(0, 1), whole[:, 1:].flatten())), rel=1e-5
    )
    assert score.over(judge.loss) == pytest.approx(math.exp(score.loss - judge.loss))
    same = judge(lambda x: tables[0][x])
    assert same.kl == 0 and same.top1 == 1 and same.loss == judge.loss


def test_every_row_is_a_pipeline_and_every_recipe_a_row() -> None:
    known = settings()
    assert {f"recipe {name}" for name, r in recipes().items() if "qat" not in name} <= set(known)
    for setting in known.values():
        assert Pipeline(setting.pipeline).lossy and setting.step.name == "quantize"


@pytest.mark.slow
def test_rows_are_measured_once_and_make_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "schemes.json"
    only = ["--only", "int4:g64", "int4:g64 gptq", "KV4"]
    schemes.main([*WORDS.split(), str(path), *only])
    record = json.loads(path.read_text())
    nearest, gptq, caches = record["rows"]
    assert not [row for row in record["rows"] if {"failed", "skipped"} & set(row)]
    assert nearest["bits"] == 4.625 and nearest["ratio"] == pytest.approx(math.exp(nearest["loss"] - record["loss"]))
    assert 0 < gptq["kl"] < nearest["kl"] and "bits" not in caches
    measured = []
    real = schemes.Benchmark.fill
    monkeypatch.setattr(schemes.Benchmark, "fill", lambda self, row, s: (measured.append(s.name), real(self, row, s)))
    schemes.main([*WORDS.split(), str(path), "--only", "int4:g64", "KV8"])
    assert measured == ["KV8"]
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["int4:g64", "int4:g64 gptq", "KV8", "KV4"]
    assert rows["int4:g64"] == nearest | {"commit": record["environment"]["commit"]}
    monkeypatch.setattr(schemes, "code", lambda: "other")
    schemes.main([*WORDS.split(), str(path), "--only", "int4:g64"])
    assert measured == ["KV8", "int4:g64"]
    maker = runpy.run_path(str(Path(schemes.__file__).parents[1] / "docs" / "schemes.py"))
    maker["page"].__globals__["RECORDS"] = path
    page = maker["page"]()
    assert f"| int4:g64 | {nearest['ratio']:.4f} |" in page and "## Keys and values" in page


def test_the_summary_tells_who_is_behind() -> None:
    summary = SimpleNamespace(**runpy.run_path(str(Path(schemes.__file__).parents[1] / "docs" / "schemes.py"))).summary
    rows = [{"name": "a", "worse": 0.02, "bits": 4.5}, {"name": "b", "worse": -0.1, "bits": 4.5}, {"name": "c"}]
    assert "1 are worse by more than 1% of its perplexity: a. Of the 2 at 4 bits and less, 1 are ahead" in summary(
        rows
    ).replace("\n", " ")
    assert "None is worse" in summary(rows[1:])
