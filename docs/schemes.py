"""The page docs/schemes.md, from the rows of `python benchmarks/schemes.py` in docs/schemes.json."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent / "schemes.json"
PEERS = {"torchao": "torchao", "llm_compressor": "llm-compressor"}
COLUMNS = ("", "ratio", "KL", "KL by position", "top-1", "bits", "MB", "s", *PEERS.values(), "ahead")
INTRODUCTION = """\
# Every scheme, measured

Written by `python docs/generate.py` from `docs/schemes.json`, which one command measures:

```bash
pip install --no-deps torchao llmcompressor  # and what they import; without them their columns stay empty
python benchmarks/schemes.py
```

{circumstances}

| column | |
|---|---|
| ratio | perplexity over the original's |
| KL | mean KL(original ‖ quantized) of the next token, in nats; by position: of each quarter of a window |
| top-1 | positions with the same likeliest token |
| bits, MB | of the products' weights, scales and zero points included |
| s | seconds to quantize, calibration included, on one thread of a machine that was busy with other work |
| torchao, llm-compressor | their ratio for the same setting; – : they have none |
| ahead | our perplexity below the better of theirs (negative: above) |

These weights were published on a grid of 4 bits between the ends of each group of 32: at just that setting rounding
would be lossless, so it is not here. Settings that both have are theirs by default otherwise: group scales in the
model's own type, `actorder="static"` where a row says `order`, their `mse` observer where it says `:mse`.

{summary}
"""
CIRCUMSTANCES = (
    "{model} in float32, {tokens} held-out tokens in windows of {length}; {calibration} tokens to calibrate on, the "
    "same for all libraries. Both are halves of one text, the standard library's `pydoc_data.topics`. The original has "
    "a perplexity of {perplexity:.2f}. Head and embedding are left alone on all sides. {versions}; {date}, commit "
    "{commit}{others}."
)
NOTES = """\
## Notes

- A row `recipe NAME` is what the recipe quantizes with: see [quantization.md](quantization.md#recipes).
- torchao's W8A8 and W4A8 give activations a scale a token, W4A8 with a zero point. It refuses FP8 activations on a CPU,
  and its GPTQ is a prototype, which was not tried.
- Settings of `benchmarks/compared/settings.py` that have no row have not been measured yet.
- Rows of keys and values, of rotations and of formats that these libraries do not have stand alone.
- A perplexity of 1024 tokens is known to a percent or two: on 2048 tokens of the same text the standard error of the
  ratio, token by token, was 0.8% for int6 and 2.5% for int4:g64:sym. Two runs of unchanged code differed as much where
  activations are rounded or a Hessian decides (llm-compressor's W8A8: 1.050 and 1.027). Of two ways to round, the
  divergence says more.
- Symmetric integers: torchao and llm-compressor divide the largest magnitude by 2^(b−1) − ½, which clips it by half a
  step where it is positive, and Fuseline by 2^(b−1) − 1. Theirs leaves 3% less squared error at 6 bits and 9% less at
  4; on those 2048 tokens the perplexity of int6 was 1.7% ± 0.6% lower by it, that of int4:g64:sym the same (0.3% ±
  2.4%), its divergence 6% lower. That is what int6, int4:g64:sym and W4A8 are behind by; `:mse` finds such ranges.
- `:mse` of llm-compressor sums |error|^2.4 over parts of the range down to 0.8; ours |error|^2.5 for integers, down to
  a fifth. With squares, int4:g64:mse was behind. What nvfp4 is behind by was not looked into.
"""


def page() -> str:
    record = json.loads(RECORDS.read_text(encoding="utf-8"))
    rows, options, facts = record["rows"], record["options"], record["environment"]
    known = {**facts, **{PEERS[name]: version for name, version in facts.get("peers", {}).items() if version}}
    versions = ", ".join(
        f"{name} {known[name]}" for name in ("torch", "transformers", *PEERS.values()) if name in known
    )
    elsewhere = {row["name"]: row["commit"] for row in rows if row.get("commit", facts["commit"]) != facts["commit"]}
    others = f" ({'; '.join(f'{name}: {commit}' for name, commit in elsewhere.items())})" if elsewhere else ""
    circumstances = CIRCUMSTANCES.format(
        model="SmolLM2-135M-Instruct" if options["model"] == "demo:smollm2" else options["model"],
        tokens=options["tokens"], length=options["length"], calibration=options["calibration"],
        perplexity=record["perplexity"], versions=versions, date=facts["date"], commit=facts["commit"], others=others,
    )  # fmt: skip
    parts = [INTRODUCTION.format(circumstances=wrapped(circumstances), summary=summary(rows))]
    for part in dict.fromkeys(row["part"] for row in rows if "part" in row):
        lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(row) for row in rows if row.get("part") == part)]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"## {part[0].upper()}{part[1:]}\n\n{table}")
    failures = list(failed(rows))
    notes = NOTES + "".join(f"{wrapped(f'- {line}', '  ')}\n" for line in failures)
    return "\n".join([*parts, notes])


def summary(rows: list[dict[str, Any]]) -> str:
    """How we stand beside the others, from the rows that have them."""
    beside = [row for row in rows if "worse" in row]
    if not beside:
        return "No other library was installed."
    behind = [row for row in beside if row["worse"] > 0.01]
    few = [row for row in beside if row.get("bits", 8.0) < 5]
    ahead = sum(row["worse"] < 0 for row in few)
    said = f"{len(beside)} rows have a figure of another library. "
    said += "None is worse by more than 1% of its perplexity" if not behind else (
        f"{len(behind)} are worse by more than 1% of its perplexity: {', '.join(row['name'] for row in behind)}"
    )  # fmt: skip
    return wrapped(f"{said}. Of the {len(few)} at 4 bits and less, {ahead} are ahead of the best of theirs.")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "ratio" not in row:
        reason = row.get("failed") or row.get("skipped") or "not measured"
        return (row["name"], reason.replace("|", "\\|"), *("" for _ in COLUMNS[2:]))
    quarters = " ".join(figure(row[f"kl_{number}"]) for number in range(1, 5))
    peers = [peer(row, name) for name in PEERS]
    ahead = f"{-row['worse']:+.1%}" if "worse" in row else ""
    bits, size = (f"{row[key]:.2f}" if key in row else "–" for key in ("bits", "mb"))
    return (
        row["name"], f"{row['ratio']:.4f}", figure(row["kl"]), quarters, f"{row['top1']:.1%}", bits, size,
        f"{row['seconds']:.0f}", *peers, ahead,
    )  # fmt: skip


def peer(row: dict[str, Any], name: str) -> str:
    if f"{name}_ratio" in row:
        return f"{row[f'{name}_ratio']:.4f}"
    return "failed" if f"{name}_failed" in row else "–"


def failed(rows: list[dict[str, Any]]) -> Iterable[str]:
    """What another library said where it failed, once each."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, shown in PEERS.items():
            if f"{name}_failed" in row:
                said.setdefault((shown, row[f"{name}_failed"]), []).append(row["name"])
    for (shown, reason), names in said.items():
        yield f"{shown} failed at {', '.join(names)}: {reason}"


def figure(value: float) -> str:
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 116, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
