"""An examination as Markdown: what a user pastes into an issue, with versions, lines and nothing of the weights."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .findings import Examination, Graph


def markdown(e: Examination) -> str:
    """The report: versions, findings with their remedies, then graph by graph."""
    parts = [
        f"# {e.model}: {_verdict(e)}",
        "",
        f"Pipeline `{e.pipeline or '(no pass)'}`; {versions()}.",
        f"Parameters: {_parameters(e)}.",
        "",
        *_findings(e),
        *_fixed(e),
    ]
    shown: Counter[str] = Counter()
    for number, graph in enumerate(e.graphs):
        text = "\n".join(_graph(graph))
        shown[text] += 1
        same = " (as one above)" if shown[text] > 1 else ""
        parts += [f"## Graph {number}: {graph.nodes} nodes{same}", ""]
        if not same:
            parts += [text, ""]
    return "\n".join(parts).rstrip() + "\n"


def _verdict(e: Examination) -> str:
    graphs = "one graph" if len(e.graphs) == 1 else count(len(e.graphs), "graph")
    return f"{graphs}, {len(e.findings()) or 'nothing'} to look at"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(total: int) -> str:
    """Bytes, as a person reads them."""
    return f"{total / 1e6:.1f} MB" if total >= 1e5 else f"{total} bytes"


def versions() -> str:
    """`torch 2.13.0, triton 3.6.0, …`, those that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in ("fuseline", "torch", "triton", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _parameters(e: Examination) -> str:
    each = [f"{number} of {dtype} ({size(total)})" for dtype, (number, total) in e.parameters.items()]
    return ", ".join(each) or "none"


def _findings(e: Examination) -> Iterable[str]:
    findings = e.findings()
    if not findings:
        return
    yield "## To look at"
    yield ""
    code = {f"{one.at.file}:{one.at.line}": one.at.code for one in e.breaks}
    for number, finding in enumerate(findings, 1):
        yield f"{number}. {finding.what}"
        if finding.where is not None:
            line = code.get(finding.where)
            yield f"   - at `{finding.where}`" + (f": `{line}`" if line else "")
        if finding.remedy is not None:
            yield f"   - remedy: {finding.remedy}"
    yield ""


FIXED = {
    "size": "Sizes that a second value turns into symbols, by one more capture; no third value costs another:",
    "constant": "Sizes that stay numbers, by the model's weights or code; each other value is captured anew:",
    "value": "Arguments that are no tensors; another value is another capture:",
}


def _fixed(e: Examination) -> Iterable[str]:
    kinds = [kind for kind in FIXED if any(one.kind == kind for one in e.fixed)]
    if kinds:
        yield "## Written into the first graph"
        yield ""
    for kind in kinds:
        names = ", ".join(f"`{one}`" for one in e.fixed if one.kind == kind)
        yield f"- {FIXED[kind]} {names}"
    if kinds:
        yield ""


def _graph(graph: Graph) -> Iterable[str]:
    if graph.refusal is not None:
        yield f"Not compiled: {graph.refusal}."
        return
    for one in graph.inputs:
        shape = ", ".join(map(str, one.shape))
        yield f"- input `{one.name}`: {one.dtype}[{shape}]" + (", written to" if one.mutated else "")
    yield ""
    yield from _passes(graph)
    if graph.training:
        yield "Captured for training: autograd works on ATen, and there are no kernels."
    else:
        yield f"{count(graph.kernels, 'kernel')} for {count(graph.regions, 'region')}."
    for fallback in graph.fallbacks:
        yield f"- PyTorch runs {', '.join(fallback.ops)}: {fallback.reason} ({_place(fallback.lines)})"
    yield ""
    launched = [one for one in graph.leftovers if not one.view]
    if launched:
        yield "Outside of regions, through PyTorch:"
        yield ""
        yield from (f"- {one.count} × `{one.op}` ({_place(one.lines)})" for one in launched)
        yield ""
    views = sum(one.count for one in graph.leftovers if one.view)
    yield f"{count(views, 'view')}. Weights: {size(graph.weights_before)} → {size(graph.weights_after)}."
    yield from (f"- `{one.name}` stays {size(one.bytes)}: {one.reason}" for one in graph.whole)


def _passes(graph: Graph) -> Iterable[str]:
    if not graph.passes:
        return
    yield "| pass | tier | sites | refused | nodes |"
    yield "|---|---|---|---|---|"
    for one in graph.passes:
        nodes = f"{one.nodes_before} → {one.nodes_after}"
        yield f"| `{one.text}` | {one.tier} | {len(one.taken)} | {len(one.refused)} | {nodes} |"
    yield ""
    for one in graph.passes:
        if one.taken:
            rules = Counter(taken.rule for taken in one.taken)
            yield f"- `{one.name}`: {', '.join(f'{n} {rule}' for rule, n in rules.items())}"
        if one.failure is not None:
            yield f"- `{one.name}`: {one.failure}" + (f"; remedy: {one.remedy}" if one.remedy else "")
        for reason, many in Counter(refused.reason for refused in one.refused).most_common():
            yield f"- `{one.name}` refused {many}: {reason}"
    yield ""
    rows = [
        f"| `{one.name}` | {what} | `{site}` | {line} |"
        for one in graph.passes
        for what, site, line in [
            *((f"refused: {r.reason}", r.site, r.line or "") for r in one.refused),
            *((f"nearly {n.rule}: {n.problem}", n.module, n.line or "") for n in one.near),
            *((t.rule, t.site, _place(t.lines)) for t in one.taken),
        ]
    ]
    if rows:
        yield f"<details><summary>{count(len(rows), 'site')}</summary>"
        yield from ("", "| pass | rule | site | lines |", "|---|---|---|---|", *rows, "", "</details>", "")


def _place(lines: Sequence[str]) -> str:
    more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    return f"{lines[0]}{more}" if lines else "no line is known"
