"""The page docs/choosing.md: which recipe for which purpose, with the figures that docs/schemes.json and the newest
results in benchmarks/results have. What was not measured says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NONE = "not measured"
#: What somebody wants, what to write, the row of schemes.json, the row of the decode table, and what to know.
CHOICES = (
    ("the same results, faster", "", None, "fuseline-bf16", "exact passes only: what runs when no pipeline is named"),
    ("half the memory, results as good as the same", "w8a8", "recipe w8a8", None, "no data"),
    ("half the memory, weights alone", "raise,quantize{weights=int8},fuse", "int8", None, "no data"),
    ("a quarter of the memory", "w4a16", "recipe w4a16", None, "needs data: minutes of calibration"),
    ("a quarter, at once", "raise,quantize{weights=int4:g64},fuse", "int4:g64", "fuseline-int4", "no data"),
    ("4-bit weights, 8-bit activations", "w4a8", "recipe w4a8", None, "needs data"),
    ("float8", "fp8", "recipe fp8", None, "needs data"),
    ("float8, at once", "raise,quantize{weights=fp8,activations=fp8:token},fuse", "FP8 token", None, "no data"),
    ("MXFP4", "mxfp4", "recipe mxfp4", None, "no data; the format alone costs this much"),
    ("everything in 4 bits", "w4a4kv4-rotated", "recipe w4a4kv4-rotated", None, "needs data"),
)
INTRODUCTION = """\
# Choosing a recipe

Written by `python docs/generate.py` from `docs/schemes.json` and the newest `*-decode.json` of `benchmarks/results`.

Begin at the top; go down while the cost is one that your task can pay. Each row is a pipeline, to be written behind
`-p`, in `fuseline.optimize(model, …)`, or in the options of `torch.compile`.

| you want | write | perplexity | KL | top-1 | weights, MB | decode, ms | to know |
|---|---|---|---|---|---|---|---|
"""
NOTES = """
- *perplexity* over the original's, *KL* from it in nats, *top-1* and *weights* are of SmolLM2-135M-Instruct, a small
  model with little to spare: {quality};
  [schemes.md](schemes.md) has all schemes and how they were measured. Larger models lose less at the same bits.
- *decode* is milliseconds a token at the Llama-3-8B shape, batch 1, where eager takes {eager}:
  {speed}; [benchmarks.md](benchmarks.md).
  4 bits were measured there in groups of 128.

Your own model says more than any table: this prints perplexity, KL and weights before and after.

```text
fuseline run MODEL -p w8a8
```

Further questions, and the page that answers them:

| question | page |
|---|---|
| some layers are more sensitive than others | [formats by site, under a budget](quantization.md#formats-by-site) |
| the context is long and the cache is what fills memory | [codes in the cache](kv-cache.md) |
| training may go on | [training with rounding](qat.md) |
| decoding at batch 1 is bound by bytes | [activation sparsity](sparsity.md) |
| activations have outliers | [rotations](rotations.md) |
| where does the data come from | [calibration](calibration.md) |
| who else can read the result | [saving and exporting](saving.md) |
"""


def page() -> str:
    schemes = json.loads((ROOT / "docs" / "schemes.json").read_text(encoding="utf-8"))
    quality = {row["name"]: row for row in schemes["rows"]}
    path = sorted(RESULTS.glob("*-decode.json"))[-1]
    decode = json.loads(path.read_text(encoding="utf-8"))
    speed = {row["name"]: row for row in decode["rows"]}
    rows = [line(choice, quality, speed) for choice in CHOICES]
    facts, gpu = schemes["environment"], decode["environment"]
    notes = NOTES.format(
        quality=f"`{facts['command']}`, {facts['date']}",
        eager=f"{speed['eager']['ms']:.1f}",
        speed=f"`{gpu.get('command', 'python benchmarks/decode.py')}`, {gpu['date']}, {gpu['gpu']}",
    )
    return f"{INTRODUCTION}{''.join(rows)}{notes}"


def line(choice: tuple[Any, ...], quality: dict[str, Any], speed: dict[str, Any]) -> str:
    want, write, scheme, decoded, know = choice
    found = quality.get(scheme, {})
    exact = scheme is None
    figures = [
        "1" if exact else shown(found.get("ratio"), ".3f"),
        "0" if exact else shown(found.get("kl"), ".2g"),
        "100%" if exact else shown(found.get("top1"), ".1%"),
        "as before" if exact else shown(found.get("mb"), ".0f"),
        shown(speed.get(decoded, {}).get("ms"), ".1f"),
    ]
    return f"| {' | '.join([want, f'`{write}`' if write else 'nothing', *figures, know])} |\n"


def shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
