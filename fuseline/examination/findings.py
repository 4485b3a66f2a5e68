"""What an examination holds, and what of it a user should know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..compiler.debug.dry_run import Break
from ..compiler.debug.signature import Fixed, Input
from ..compiler.debug.takes import Takes
from ..compiler.pipeline import DEFAULT


@dataclass(frozen=True)
class Finding:
    """Something that a user should know, where it is, and what to do about it."""

    what: str
    where: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class Fallback:
    """A region that `fuse` marked and no kernel takes: PyTorch runs its ops one by one."""

    region: str
    reason: str
    ops: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Leftover:
    """An op outside of all regions: `count` calls of PyTorch's; a view costs no launch."""

    op: str
    count: int
    view: bool
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Whole:
    """A weight that no pass made smaller, in a graph where others were."""

    name: str
    bytes: int
    reason: str


@dataclass
class Graph:
    """One captured graph, what the passes make of it, and what runs it.

    marked: whether some pass grouped ops for codegen. kernels, regions: distinct kernels, and regions that they serve.
    weights_before, weights_after: bytes.
    refusal: why the backend does not take the graph; then there is nothing else.
    """

    nodes: int
    training: bool = False
    inputs: list[Input] = field(default_factory=list)
    passes: list[Takes] = field(default_factory=list)
    marked: bool = False
    kernels: int = 0
    regions: int = 0
    fallbacks: list[Fallback] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    weights_before: int = 0
    weights_after: int = 0
    whole: list[Whole] = field(default_factory=list)
    refusal: str | None = None
    remedy: str | None = None


@dataclass
class Examination:
    """What `examine` found. `ok`: one graph of the whole model, every pass took sites, every region has a kernel.

    parameters: dtype → (how many, bytes), shared ones once. fixed: what another capture follows from.
    error: what stopped the capture, where the model alone runs.
    """

    model: str
    pipeline: str
    graphs: list[Graph] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    fixed: list[Fixed] = field(default_factory=list)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.findings()

    def findings(self) -> list[Finding]:
        """What stands in the way, the worst first."""
        return list(_findings(self))

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        for one, entry in zip(self.breaks, data["breaks"], strict=True):
            entry.clear()
            entry.update(file=one.at.file, line=one.at.line, code=one.at.code, reason=one.at.reason)
            entry.update(function=one.at.function, kind=one.remedy.kind, remedy=one.remedy.advice)
        data["parameters"] = {dtype: {"count": n, "bytes": size} for dtype, (n, size) in self.parameters.items()}
        data["findings"] = [asdict(finding) for finding in self.findings()]
        return {**data, "ok": self.ok}

    def __str__(self) -> str:
        from .report import markdown

        return markdown(self)


def _findings(e: Examination) -> Iterable[Finding]:
    if e.error is not None:
        yield Finding(f"the model runs by itself, but not through Dynamo: {e.error}", remedy=UNCAPTURED)
    elif not e.graphs:
        remedy = None if e.breaks else "take @torch.compiler.disable off forward; or it computes nothing with tensors"
        yield Finding("no graph was captured: the whole forward runs in Python", remedy=remedy)
    for one in e.breaks:
        whole = f"; {one.at.function} runs in Python as a whole" if one.at.function else ""
        yield Finding(
            f"graph break, {one.remedy.kind}: {one.at.reason}{whole}", f"{one.at.file}:{one.at.line}", one.remedy.advice
        )
    if len(e.graphs) > 1 and not e.breaks:
        yield Finding(f"{len(e.graphs)} graphs, each of a function that Python calls", remedy=SEVERAL)
    for fixed in e.fixed:
        if fixed.kind == "attribute":
            yield Finding(
                str(fixed), remedy="a buffer (register_buffer) in place of the Python number, or count outside"
            )
    if any(g.training for g in e.graphs):
        yield Finding("captured for training, where no kernels are used: parameters want gradients", remedy=TRAINING)
    told: set[str] = set()
    for finding in (finding for graph in e.graphs for finding in _of_graph(graph, len(e.graphs))):
        if finding.what not in told:
            told.add(finding.what)
            yield finding


MARK = f'"…,{DEFAULT.rpartition(",")[2].partition("{")[0]}"'  # the pass that marks, by name: none is looked up here
UNCAPTURED = "torch.compile(model) and TORCH_LOGS=dynamo show whether PyTorch alone has the same trouble"
SEVERAL = "call the functions from a forward that is traced: no torch.compiler.disable around them"
LEAVE_OUT = "leave it out of the pipeline"
A_FAULT = "a fault of the pass, not of the model: open an issue with this report"
ATTRIBUTE = "a buffer (register_buffer) in place of the Python number, or count outside of forward"
TRAINING = "with torch.no_grad(): for inference"


def _of_graph(graph: Graph, count: int) -> Iterable[Finding]:
    if graph.refusal is not None:
        yield Finding(f"a graph of {graph.nodes} nodes is not compiled: {graph.refusal}", remedy=graph.remedy)
    for one in graph.passes:
        # What lies between two breaks may be a single add: a pass that finds nothing there is no news.
        if one.failure is not None and (count == 1 or not one.failure.startswith("found no site")):
            what = one.failure if one.failure.startswith("pass '") else f"pass '{one.name}' {one.failure}"
            crash = f"pass '{one.name}' failed" in one.failure
            yield Finding(what, remedy=one.remedy or (A_FAULT if crash else LEAVE_OUT))
    if not graph.training and not graph.marked and graph.refusal is None:
        yield Finding("no pass marks what becomes a kernel: PyTorch runs every op", remedy=f"-p {MARK}")
    for fallback in graph.fallbacks:
        yield Finding(f"no kernel for {_list(fallback.ops)}: {fallback.reason}", next(iter(fallback.lines), None))


def _list(ops: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(re.sub(r"^(aten|fuseline)\.|\.\w+$", "", op) for op in ops))
