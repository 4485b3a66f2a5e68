"""`method=lkd`: weights trained so that each part of the model does, rounded, what it did before.

Parts come in the graph's order. Each reads what the rounded parts before it leave, as it was and rounded, activations
too, and the weights w of the rounded one follow the gradient of ‖difference‖², straight through the rounding (Bengio et
al., 2013), by Adam at a rate that is a share of each weight's rounding step. After each round over the batches the
error is looked at, and the best weights so far are kept: a part is never worse than rounded to nearest. No labels, no
gradient through the whole model, and at any time one part's gradients.

Source: ZeroQuant's layer-by-layer knowledge distillation (Yao et al., 2022, section 3.4), there of whole layers of a
transformer, at a rate that is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from ...compiler.planned import probe
from ...compiler.program import Program
from ...compiler.progress import steps
from ...compiler.schemes import Scheme
from ..quantize_sites import Site
from .columns import expanded, grouped
from .inputs import finite
from .journal import Journal
from .running import Running
from .segments import Segment, segments
from .sites_after import sites_after
from .stream import check, with_weight

if TYPE_CHECKING:
    from ..quantize import Quantize

RATE = 0.05
"""Of a step of Adam, in rounding steps of the weight."""


class Part(Running):
    """Runs pieces of a program, each on all batches; what later pieces read of a batch is kept.

    data: flat arguments of one call each. rounding: whether activations are rounded, or left as they were. matrices:
    what sites multiply by, in the place of their weights.
    """

    def __init__(self, program: Program, data: Sequence[Sequence[Any]]):
        super().__init__(program)
        self.data, self.flat, self.rounding = data, data[0], True
        self.matrices: Mapping[Node, torch.Tensor] = {}
        self.position = {node: i for i, node in enumerate(program.graph.nodes)}
        self.inputs = dict(zip(program.placeholders, program.arguments, strict=True))
        self.known: list[dict[Node, Any]] = [{} for _ in data]

    def result(self, segment: Segment, number: int) -> torch.Tensor:
        """What a part makes of a batch."""
        made: torch.Tensor = self._values(segment, number)[segment.result]
        self.env = {}  # type: ignore[var-annotated]
        return made

    def keep(self, segment: Segment, number: int) -> None:
        """Runs a part once more, and keeps of it what later parts read."""
        env, end = self._values(segment, number), self.position[segment.result]
        needed = lambda node: any(self.position[user] > end for user in node.users)
        self.known[number] = {node: value for node, value in env.items() if node.op != "get_attr" and needed(node)}
        self.env = {}

    def _values(self, segment: Segment, number: int) -> dict[Node, Any]:
        self.flat, self.env = self.data[number], dict(self.known[number])
        for node in segment.nodes:
            for read in (*node.all_input_nodes, node):
                if read not in self.env:  # weights are read where they are used, and not kept
                    self.env[read] = self.run_node(read)
        return self.env

    def run_node(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self.flat[self.inputs[node]]
        if node in self.matrices:
            args = with_weight(node, self.matrices[node])
            args, kwargs = map_arg((args, node.kwargs), lambda n: self.env[n])
            target: Any = node.target
            return target(*args, **kwargs)
        return super().run_node(node)

    def _dequantized(self, node: Node, args: Sequence[Any]) -> torch.Tensor:
        x = None if self.rounding else getattr(args[0], "rounded_from", None)
        return super()._dequantized(node, args) if x is None else x


@dataclass
class Trained:
    """A site's weight while it is trained; part: of each group's range that is represented, as it was at the start."""

    site: Site
    scheme: Scheme
    original: torch.Tensor
    weight: torch.Tensor
    part: torch.Tensor | float
    best: torch.Tensor

    @staticmethod
    def of(site: Site, scheme: Scheme, weight: torch.Tensor) -> Trained:
        weight = weight.detach()
        trained = weight.clone().requires_grad_()
        return Trained(site, scheme, weight, trained, scheme.narrowed(weight), weight.clone())

    def rounded(self) -> torch.Tensor:
        """ŵ, through which gradients pass."""
        fixed = self.weight.detach()
        return self.weight + (self.scheme.rounded(fixed, self.part) - fixed)

    def step(self) -> float:
        """How far neighbouring numbers are from each other: √12 of the deviation that rounding to nearest leaves."""
        lost = self.scheme.rounded(self.original, self.part) - self.original
        return float(lost.square().mean().sqrt()) * 12**0.5


def decide_by_distillation(step: Quantize, study: Study, decided: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """Codes, scales and zero points of every site, or the reason why it has none."""
    check(study.program, study.data)
    round_at_run_time = lambda program, rewriter: step.apply(program, rewriter, None)
    program, found, name_of = sites_after(step, study, decided, round_at_run_time)
    journal = Journal(study.checkpoint, f"{step} on data {study.digest()}")
    repeated, _ = grouped(found)
    parts, refused = segments(program, [site for site in found if site not in repeated])
    for node, reason in [*refused.items(), *((site.node, reason) for site, reason in repeated.items())]:
        journal.decisions[name_of[node]] = SitePlan({"reason": reason})
    runner = Part(program, study.data)
    try:
        for segment in steps(parts, "distilling"):
            here = [name_of[site.node] for site in segment.sites]
            schemes = [step.scheme(site, decided.get(name)) for site, name in zip(segment.sites, here, strict=True)]
            with torch.no_grad():
                weights = [runner.weight(site.weight) for site in segment.sites]
            trained = [
                Trained.of(site, scheme, weight)
                for site, scheme, weight in zip(segment.sites, schemes, weights, strict=True)
                if scheme is not None
            ]
            made = [journal.decisions[name] for name in here if name in journal.decisions]
            if len(made) < len(here):
                made = _decisions(step, segment, trained, runner, here[0])
            for name, decision in zip(here, made, strict=True):
                journal.add(name, decision)
            _advance(segment, trained, made, runner)
    except BaseException:
        journal.write()
        raise
    journal.close()
    return journal.decisions


def _decisions(step: Quantize, segment: Segment, trained: list[Trained], runner: Part, name: str) -> list[SitePlan]:
    aims = _aims(segment, runner, name)
    size = sum(float(aim.double().square().sum()) for aim in aims)
    nearest = least = _error(segment, trained, runner, aims)
    optimizer = torch.optim.Adam([{"params": [one.weight], "lr": RATE * one.step()} for one in trained])
    for _ in range(step.rounds):
        for number, aim in enumerate(aims):
            optimizer.zero_grad()
            with torch.enable_grad():
                made = _rounded(segment, trained, runner, number)
                (made.float() - aim.float()).square().mean().backward()
            optimizer.step()
        if (error := _error(segment, trained, runner, aims)) < least:
            least = error
            for one in trained:
                one.best = one.weight.detach().clone()
    rows = sum(aim[..., 0].numel() for aim in aims)
    decisions = []
    for one in trained:
        groups, grid = one.scheme.grid(one.best)
        scale, zero = grid.of(groups, one.part)
        tensors = one.scheme.stored(one.best, grid, grid.codes(groups, scale, zero), scale, zero)
        structure = {
            "method": step.method.value,
            "scheme": str(one.scheme),
            "rows": rows,
            "channels": int(one.best.shape[1]),
            "probe": list(probe(one.original)),
            "error_nearest": nearest / size if size else 0.0,
            "error": least / size if size else 0.0,
        }
        decisions.append(SitePlan(structure, {key: tensor.cpu().clone() for key, tensor in tensors.items()}))
    return decisions


@torch.no_grad()
def _aims(segment: Segment, runner: Part, name: str) -> list[torch.Tensor]:
    """What the part makes of each batch as it was."""
    runner.rounding, runner.matrices = False, {}
    try:
        return list(finite((runner.result(segment, number) for number in range(len(runner.data))), name))
    finally:
        runner.rounding = True


def _rounded(segment: Segment, trained: list[Trained], runner: Part, number: int) -> torch.Tensor:
    runner.matrices = {one.site.node: one.rounded() for one in trained}
    return runner.result(segment, number)


@torch.no_grad()
def _error(segment: Segment, trained: list[Trained], runner: Part, aims: Sequence[torch.Tensor]) -> float:
    """Σ‖difference‖² over the batches."""
    made = (_rounded(segment, trained, runner, number) for number in range(len(aims)))
    return sum(float((one - aim).double().square().sum()) for one, aim in zip(made, aims, strict=True))


@torch.no_grad()
def _advance(segment: Segment, trained: list[Trained], made: Sequence[SitePlan], runner: Part) -> None:
    runner.matrices = {
        one.site.node: expanded(decision, one.scheme, one.original) for one, decision in zip(trained, made, strict=True)
    }
    for number in range(len(runner.data)):
        runner.keep(segment, number)
    runner.matrices = {}
