"""The kernels of a step against the device's limits: rows for a results file, and the plot that is drawn from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.cli.charts import Series, chart


def kernel_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a kernel, from the rows of a record of decode.py that list theirs; share: of the measured bandwidth."""
    rows = []
    for row in record["rows"]:
        for entry in row.get("kernel_table", ()):
            kernel = {"name": f"{row['name']}: {entry['kernel']}", "of": row["name"], **entry}
            if "gb_s" in entry:
                kernel["share"] = entry["gb_s"] * 1e9 / row["bandwidth"]
            rows.append(kernel)
    return rows


def points(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """For each step the kernels that compute: (FLOPs a byte, TFLOPs a second)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("flops") and row.get("bytes") and row.get("us"):
            found.setdefault(row["of"], []).append((row["flops"] / row["bytes"], row["flops"] / row["us"] / 1e6))
    return found


def roof(bandwidth: float, flops: float, low: float, high: float) -> list[tuple[float, float]]:
    """The most TFLOPs a second at each intensity between two: the memory's up to the ridge, the arithmetic's beyond."""
    ridge = flops / bandwidth
    return [
        (x, min(x * bandwidth, flops) / 1e12) for x in sorted({low, *([ridge] if low < ridge < high else []), high})
    ]


def drawn(record: Mapping[str, Any]) -> str:
    """The plot as SVG: each kernel below the roof of the rates that were measured in the same run."""
    kernels, rates = points(record["rows"]), record["rates"]
    xs = [x for places in kernels.values() for x, _ in places] or [1.0]
    low, high = min(xs) / 2, max(*xs, rates["matmul_flop_s"] / rates["bandwidth"]) * 2
    series = [Series("measured limits", roof(rates["bandwidth"], rates["matmul_flop_s"], low, high))]
    series += [Series(name, places, line=False) for name, places in kernels.items()]
    gpu = record["environment"]["gpu"]
    return chart(f"Kernels of a decode step, {gpu}", "FLOPs a byte", "TFLOP/s", series, powers=True)
