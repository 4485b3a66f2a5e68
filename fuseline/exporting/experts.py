"""Checkpoints with fewer experts: stacks, biases and the rows of routers of those that stay, and their number.

`merge-experts` with one row of the router for each expert that stays (reap, partial-preservation, and hc with
router=slice) leaves a model of the same class with a smaller number in its configuration.
"""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.expert_expressions import Mixed
from ..compiler.expressions import Expression, Param
from ..compiler.pipeline import Pipeline
from ..compiler.plan import Plan, SitePlan
from ..compiler.program import Program
from ..compiler.sites import sites
from ..passes import Fuse, MergeExperts, Raise
from ..passes.merging.layers import Layer, layers
from ..passes.merging.options import Method, Router
from ..passes.merging.routing import router
from .parameters import Assignment
from .planning import Planned
from .quantization import Quantization
from .transforms import Transforms
from .unify import Unified

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Where configurations have the number of routed experts."""


def merges(pipeline: Pipeline) -> bool:
    """Whether a pipeline merges experts."""
    return any(isinstance(step, MergeExperts) for step in pipeline.passes)


def plan(model: torch.nn.Module, captured: Program, pipeline: Pipeline, decided: Plan | None, format: str) -> Planned:
    """What an export with fewer experts writes.

    Raises:
        UserError: what no checkpoint holds, and what to do instead.
    """
    step = _only(pipeline, format)
    program, first = Pipeline(tuple(p for p in pipeline.passes if isinstance(p, Raise))).run(captured)
    chosen = decided if decided is None else Plan(str(Pipeline((step,))), decided.model, decided.sites, decided.passes)
    rewritten, second = Pipeline((step,)).run(program, plan=chosen)
    names = sites(program.graph)
    assignment = Assignment(captured)
    left: set[int] = set()
    for found in layers(program):
        name = names[found.node if isinstance(found, Layer) else found[0]]
        decision = None if decided is None else decided.of(step.name).get(name)
        if not isinstance(found, Layer) or decision is None or "groups" not in decision.structure:
            why = second["merge-experts"].refused.get(name, "the options leave it out")
            raise UserError(
                f"the experts of {name.partition('/')[0]} stay as they are, and a configuration has one number of them",
                [why],
                "a ratio that all layers can have, without only and skip",
            )
        left.add(len(decision.structure["groups"]))
        assignment.values.update(_values(found, decision))
    (count,) = left
    assignment.config = _numbers(model, count)
    return Planned(rewritten, Unified(), assignment, Transforms(), Quantization(), [*first.passes, *second.passes])


def _only(pipeline: Pipeline, format: str) -> MergeExperts:
    steps = [p for p in pipeline.passes if not isinstance(p, (Raise, Fuse))]
    (step,) = steps[:1]
    if len(steps) > 1 or not isinstance(step, MergeExperts):
        others = ", ".join(p.name for p in steps if not isinstance(p, MergeExperts))
        raise UserError(
            f"a checkpoint with fewer experts is written by merge-experts alone, without {others or 'a second one'}",
            remedy="export with raise,merge-experts{…} first, then load that folder and go on from there",
        )
    if format != "hf":
        raise UserError("a checkpoint with fewer experts has no codes", remedy="--format hf (format='hf')")
    if step.method in (Method.PUZZLE, Method.MILO):
        raise UserError(
            f"method={step.method.value} keeps all experts, in a form that no class of transformers reads",
            remedy="fuseline.save(model, path) keeps it; reap, partial-preservation and hc have checkpoints",
        )
    if step.routes is not Router.SLICE:
        raise UserError(
            f"method={step.method.value} leaves the router all its rows, and maps what it chooses to fewer experts",
            ["no class of transformers has such a map"],
            f"merge-experts{{method={step.method.value},router=slice}}",
        )
    return step


def _values(layer: Layer, decision: SitePlan) -> dict[str, Expression]:
    """The new values of a layer's parameters: all have an expert a row in their first dimension."""
    groups, shares = (tuple(map(tuple, decision.structure[name])) for name in ("groups", "shares"))
    rows = tuple((row,) for row in decision.structure["rows"])
    found = router(layer)
    assert not isinstance(found, str)  # or the layer would have been refused
    own = [layer.gate_up.weight, layer.down.weight, *(bias for bias in layer.biases if bias is not None)]
    routes = [node.meta["weight"] for node in (found.table, found.bias, *found.vectors) if node is not None]
    values: dict[str, Expression] = {}
    for expression in (*own, *routes):
        if not isinstance(expression, Param):
            raise UserError(
                f"what {layer.path} reads is computed from its parameters, and a checkpoint holds parameters",
                remedy="fuseline.save(model, path) keeps any optimized model",
            )
        merged = (groups, shares) if expression in own else (rows, ((1.0,),) * len(rows))
        values[expression.name] = Mixed(expression, *merged)
    return values


def _numbers(model: torch.nn.Module, count: int) -> dict[str, int]:
    config: Any = model.config
    found = {name: count for name in COUNTS if isinstance(getattr(config, name, None), int)}
    if not found:
        raise UserError(
            f"the configuration of {type(model).__name__} has none of {', '.join(COUNTS)}",
            remedy="fuseline.save(model, path) keeps any optimized model",
        )
    return found
