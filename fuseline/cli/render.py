"""Tables of at most 80 columns, drawn from the very data that `--json` writes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fuseline.cli.output import WIDTH, Output

NUMERIC = {"sites", "refused", "ms", "error", "times", "stage", "regs", "spill", "shared", "warps", "stages", "code"}
NUMERIC |= {"tried", "same", "changed", "added", "removed", "renamed"}


def table(output: Output, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns separated by two spaces, without lines; the last column wraps."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for position, heading in enumerate(headings):
        last = position == len(headings) - 1
        drawn.add_column(heading, justify="right" if heading in NUMERIC else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    output.console.print(drawn)


def following(output: Output, command: str, purpose: str = "") -> None:
    """The last line of a report: what to type next."""
    line = f"next: {command}    {purpose}".rstrip()
    output.console.print()
    output.console.print(line if len(line) <= WIDTH else f"next: {purpose}\n  {command}", soft_wrap=True)


def show_passes(output: Output, data: dict[str, Any]) -> None:
    """One row a pass, then what was rewritten and what was refused, by reason."""
    rows = [
        [
            p["name"],
            p["tier"],
            str(p["matched"]),
            str(len(p["refused"])),
            f"{p['nodes_before']} → {p['nodes_after']}",
            f"{p['ms']:.0f}",
            number(p["error"]),
        ]
        for p in data["passes"]
    ]
    table(output, ["pass", "tier", "sites", "refused", "nodes", "ms", "error"], rows)
    for p in data["passes"]:
        if p["rules"]:
            output.line(f"{p['name']}: {', '.join(f'{count} {rule}' for rule, count in p['rules'].items())}")
        for reason, count in Counter(p["refused"].values()).most_common(4):
            first = next(site for site, why in p["refused"].items() if why == reason)
            output.line(f"  refused {count}: {reason} ({first}{', …' if count > 1 else ''})")


def show_measurements(output: Output, data: dict[str, Any]) -> None:
    """Weights, and the metrics on held-out text where the model reads text."""
    weights = data["weights"]
    before, after = weights["before_bytes"], weights["after_bytes"]
    share = f" ({after / before:.2f}x)" if before else ""
    output.line(f"weights     {megabytes(before)} → {megabytes(after)}{share}")
    metrics = data["metrics"]
    if metrics["kl"] is not None:
        ratio = metrics["perplexity_after"] / metrics["perplexity_before"]
        output.line(
            f"perplexity  {metrics['perplexity_before']:.3f} → {metrics['perplexity_after']:.3f} ({ratio:.4f}x), "
            f"on {metrics['tokens']} tokens of held-out text"
        )
        output.line(f"KL          {number(metrics['kl'])} nats; the same top-1 token at {metrics['top1']:.2%}")


def show_breaks(output: Output, data: dict[str, Any]) -> None:
    """A line a graph break: where Dynamo ended a graph of the model, and why."""
    for one in data["breaks"]:
        output.line(f"graph break {place([one['file'] + ':' + str(one['line'])])}: {one['reason']}")


def show_kernels(output: Output, data: dict[str, Any], limit: int | None = 12) -> None:
    """One row a distinct kernel: launches, the lines it comes from, its ops; then where they compile."""
    kernels = data["kernels"]
    if not kernels:
        return
    rows = [[k["name"], str(k["count"]), place(k["lines"]), shorten_ops(k["ops"])] for k in kernels[:limit]]
    table(output, ["kernel", "times", "from", "ops"], rows)
    if limit is not None and len(kernels) > limit:
        output.line(f"… and {len(kernels) - limit} more")
    for target in kernels[0]["targets"]:
        failed = {k["name"]: k["targets"][target] for k in kernels if k["targets"][target] != "ok"}
        output.line(f"{len(kernels) - len(failed)} of {len(kernels)} kernels compile for {target}")
        for name, reason in failed.items():
            output.line(f"  {name} does not: {reason}")


def place(lines: Sequence[str]) -> str:
    """`modeling_llama.py:174 +2`: the first source line without its folder, and how many more."""
    if not lines:
        return "-"
    first = re.split(r"[/\\]", lines[0])[-1]
    return first if len(lines) == 1 else f"{first} +{len(lines) - 1}"


def shorten_ops(ops: Sequence[str]) -> str:
    """`3 mul, rms_norm`: op names without namespace and overload, counted."""
    counted = Counter(op.split("::")[-1].removeprefix("aten.").removeprefix("fuseline.").split(".")[0] for op in ops)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counted.items())


def number(value: float | None) -> str:
    """Two significant digits: 3.1e-07 is written 3.1e-7; None is a dash."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return str(value).removesuffix(".0")
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"
