"""The report as data: what `--json` writes and what the tables show."""

from __future__ import annotations

from typing import Any

from fuseline.cli.compiling import Rewritten
from fuseline.compiler.provenance import source_line
from fuseline.compiler.report import PassReport


def report_data(rewritten: Rewritten) -> dict[str, Any]:
    """pipeline, captured, passes and weights of a rewritten program."""
    captured = [n for n in rewritten.captured.graph.nodes if n.op == "call_function"]
    after = [n for n in rewritten.program.graph.nodes if n.op in ("call_function", "call_module")]
    return {
        "pipeline": rewritten.report.pipeline,
        "captured": {
            "nodes": len(rewritten.captured),
            "error": rewritten.report.captured_error,
            "with_source_line": share_with_source(captured),
        },
        "passes": [pass_data(record) for record in rewritten.report.passes],
        "rewritten": {"nodes": len(rewritten.program), "with_source_line": share_with_source(after)},
        "weights": {
            "before_bytes": rewritten.captured.weight_bytes(),
            "after_bytes": rewritten.program.weight_bytes(),
        },
    }


def pass_data(record: PassReport) -> dict[str, Any]:
    """refused: site → reason; rules: rule → sites; error: max|Δ|/max|reference| after the pass."""
    return {
        "name": record.name,
        "text": record.text,
        "tier": record.tier,
        "ms": round(record.ms, 2),
        "verify_ms": round(record.verify_ms, 2),
        "matched": record.matched,
        "rules": dict(record.rules),
        "refused": dict(record.refused),
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "error": record.error,
    }


def share_with_source(nodes: list[Any]) -> float:
    """The share of nodes that know a line of the user's or the model's code."""
    return sum(source_line(node) is not None for node in nodes) / len(nodes) if nodes else 1.0
