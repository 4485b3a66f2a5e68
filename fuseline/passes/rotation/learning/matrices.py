"""Learning R1 and every R2 on calibration batches."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ....compiler.expressions import Planned
from ....compiler.framework import Study
from ....compiler.plan import SitePlan
from ....compiler.progress import steps
from ..rotations import Kind, Rotation
from .cayley import Cayley, nearest_orthogonal
from .journal import Journal
from .losses import Criterion
from .trial import Trial, Variants, loss_of, mean_loss

if TYPE_CHECKING:
    from .. import Rotate

LEARNT = ("R1", "R2")


def learn(
    step: Rotate, variants: Variants, measure: Criterion, study: Study
) -> tuple[dict[str, SitePlan], dict[str, float]]:
    """The matrices by site, in float64, and the loss over all batches with those at the start and with the learned."""
    start: dict[tuple[str, str], torch.Tensor] = {}

    def begin(label: str, node: Node, size: int) -> Rotation:
        if label not in LEARNT:
            return Rotation(label, size, Kind.HADAMARD, step.seed)
        site = variants.site(node)
        matrix = Rotation(label, size, Kind.RANDOM_HADAMARD, step.seed + len(start)).value()
        start[site, label] = matrix
        return Rotation(label, size, Kind.LEARNED, step.seed, matrix)

    program = variants.make(step.asked, begin)
    planned = {e for node in program.weights() for e in node.meta["weight"].walk() if isinstance(e, Planned)}
    device = {p.digest: p for p in planned}
    expressions = {key: Planned.of(matrix, "cpu").digest for key, matrix in start.items()}
    leaves = {
        key: start[key].float().to(device[digest].device).requires_grad_()
        for key, digest in expressions.items()
        if digest in device
    }
    trial = Trial(program, {device[expressions[key]]: leaf for key, leaf in leaves.items()})
    original = Trial(variants.program)
    optimizer = Cayley(leaves.values(), step.rate)
    search = f"{step} before {', '.join(map(str, variants.after))}, on data {study.digest()}"
    journal = Journal(study.checkpoint, search, leaves, optimizer)
    order = random.Random(step.seed)
    batches = [order.randrange(len(study.data)) for _ in range(step.steps)]
    first = journal.resume()

    mean = partial(mean_loss, measure, original, trial, study.data)
    at_start = journal.measured("start", mean)
    for number in steps(range(first, step.steps), "learning rotations", completed=first, total=step.steps):
        for group in optimizer.param_groups:
            group["lr"] = step.rate * (1 + math.cos(math.pi * number / step.steps)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            loss_of(measure, original, trial, study.data[batches[number]]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        journal.write(number + 1)
    found = {key: nearest_orthogonal(leaf.detach()).cpu() for key, leaf in leaves.items()}
    for key, leaf in leaves.items():
        leaf.detach().copy_(found[key])
    learned = mean()
    if not learned < at_start:  # a rate too large, or batches too few: never worse than where it began
        found = {key: start[key] for key in leaves}
    journal.close()
    decisions: dict[str, SitePlan] = {}
    for (site, label), matrix in found.items():
        decisions.setdefault(site, SitePlan()).tensors[label] = matrix
    return decisions, {"start": at_start, "learned": learned}
