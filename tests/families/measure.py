"""What becomes of one model under one pipeline, through `fuseline.optimize`: an outcome with its reason or its figures.

exact    at least one site was rewritten, and the outputs are eager's within 1e-4 (max|Δ| / max|reference|, float32)
lossy    the same for a pass that rounds: the KL divergence of the logits from eager's, in nats
refused  no site was rewritten, with Fuseline's reason; the outputs are still eager's
fails    an exception, a wrong result, or a model of which nothing was compiled
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch._dynamo.utils import counters

import fuseline
from fuseline.compiler.errors import EmptyPassError
from fuseline.compiler.observe.numerics import error

from .rows import Row

BOUND = 1e-4
PASSES = {
    "raise": "raise{allow_empty}",
    "raise,fuse": "raise{allow_empty},fuse{allow_empty}",
    "int8": "quantize{weights=int8,allow_empty}",
    "int4": "quantize{weights=int4:g32,allow_empty}",
}
"""A column's title and the pipeline it runs. `allow_empty`, so that a model with graph breaks may have parts without a
site; whether there was one at all is judged over the model."""


@dataclass
class Outcome:
    """One cell of the table.

    graphs: how many Dynamo handed over. breaks: why there are several, as Dynamo says it. rules: rewrites by rule, in
    all graphs. refused: sites left alone, by reason.
    error: max|Δ|/max|reference| over all outputs, for what must be equal. kl: nats, for what may differ.
    """

    outcome: str
    reason: str | None = None
    graphs: int = 0
    breaks: dict[str, int] = field(default_factory=dict)
    rules: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    error: float | None = None
    kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v not in (None, {}, 0) or k == "error" and v is not None}


def compiled(row: Row, column: str) -> tuple[torch.nn.Module, Any, Any]:
    """A row's model under a column's pipeline; its outputs before and after, gradients off."""
    torch.compiler.reset()
    counters.clear()
    model, inputs = row.model(), row.inputs(2, 1)
    with torch.no_grad():
        expected = model(**inputs)
        expected = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, expected)
        return fuseline.optimize(model, PASSES[column]), expected, model(**inputs)


def measure(row: Row, column: str) -> Outcome:
    """Compiles and runs a row, in the default target of this machine, and says what came of it."""
    try:
        model, expected, actual = compiled(row, column)
    except Exception as problem:  # whatever it is, the table says so
        return Outcome("fails", _first_lines(problem))
    return judge(row, column, model, expected, actual)


def judge(row: Row, column: str, model: torch.nn.Module, expected: Any, actual: Any) -> Outcome:
    """The outcome of outputs that are there."""
    found = fuseline.reports(model)
    if not found:
        why = "; ".join(_breaks()) or "Dynamo captured no graph and gave no reason"
        return Outcome("fails", f"nothing was compiled: {why}")
    passes = [p for compilation in found for p in compilation.report.passes]
    rules, refused = Counter[str](), Counter[str]()
    for one in passes:
        rules.update(one.rules)
        refused.update(one.refused.values())
    outcome = Outcome("exact", graphs=len(found), breaks=_breaks(), rules=_sorted(rules), refused=_sorted(refused))
    lossy = any(p.tier == "lossy" and p.matched for p in passes)
    if lossy:
        outcome.outcome, outcome.kl = "lossy", divergence(row.logits(expected), row.logits(actual))
        if not math.isfinite(outcome.kl):
            outcome.outcome, outcome.reason = "fails", "the logits are not finite"
        return outcome
    outcome.error = largest_error(actual, expected)
    if not outcome.error <= BOUND:
        outcome.outcome, outcome.reason = "fails", f"the outputs differ from eager by {outcome.error:.1e}"
    elif not rules:
        outcome.outcome, outcome.reason = "refused", _reason(column, found)
    return outcome


def largest_error(actual: Any, expected: Any) -> float:
    """Over all tensors of a model's outputs; infinite where they are not laid out alike."""
    after, before = (
        [x for x in pytree.tree_leaves(_fields(o)) if isinstance(x, torch.Tensor)] for o in (actual, expected)
    )
    if [(x.shape, x.dtype) for x in after] != [(x.shape, x.dtype) for x in before]:
        return math.inf
    return max(error(a.double(), b.double()) for a, b in zip(after, before, strict=True))


def divergence(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Mean over positions of KL(reference ‖ candidate) in nats, of logits brought to a standard deviation of 2.

    The temperature is the reference's: a classifier of random weights has logits so near to uniform that any change has
    a divergence of zero.
    """
    scale = 2 / reference.double().std()
    p, q = (F.log_softmax(x.double() * scale, -1).flatten(0, -2) for x in (reference, candidate))
    return F.kl_div(q, p, reduction="batchmean", log_target=True).item()


def _fields(output: Any) -> Any:
    """A transformers output as a plain dict: pytree does not open every class of them."""
    return dict(output) if hasattr(output, "keys") else output


def _reason(column: str, found: list[Any]) -> str:
    """What the pass would have said of the largest graph, without `allow_empty`."""
    largest = max(found, key=lambda compilation: len(compilation.captured))
    try:
        fuseline.Pipeline(PASSES[column].replace(",allow_empty", "").replace("{allow_empty}", "")).run(largest.captured)
    except EmptyPassError as refusal:
        return "; ".join([refusal.headline, *refusal.details])
    return "no site"


def _breaks() -> dict[str, int]:
    """Dynamo's own reasons for its graph breaks since the counters were cleared."""
    found = Counter[str]()
    for kind in ("graph_break", "unimplemented"):
        for reason, count in counters[kind].items():
            lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
            found[lines[0]] += count
    return _sorted(found)


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _first_lines(problem: BaseException) -> str:
    while isinstance(problem.__cause__, fuseline.FuselineError):
        problem = problem.__cause__
    text = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {' '.join(text[:3])}"
