"""Parameters that are not one plain tensor of the model's own: DTensors, and what `fully_shard` gathers.

- `fully_shard` hands each forward a plain parameter, gathered from all ranks: every graph can read it as it is. What
  is derived from it could not be kept, since its version does not tell when it was gathered anew.
- A DTensor (`parallelize_module`) is opaque before dispatch: how an op on it is split is decided below the level at
  which passes work. Such a graph runs as it was captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from . import compat
from .errors import UserError
from .framework import Tier
from .pipeline import Pipeline
from .program import Program
from .reads import derived_reads

log = logging.getLogger("fuseline")


def run_as_captured(module: GraphModule, inputs: Sequence[Any], pipeline: Pipeline) -> Callable[..., Any] | None:
    """Dynamo's graph as it is, if one of its inputs is a wrapper of other tensors; None if all are plain.

    Raises:
        UserError: a lossy pass was named: leaving it out would be another model than the one asked for.
    """
    names = [n for n in module.graph.nodes if n.op == "placeholder"]
    wrapped = [(n, value) for n, value in zip(names, inputs, strict=True) if compat.is_wrapper(value)]
    if not wrapped:
        return None
    node, value = wrapped[0]
    name = compat.qualified_name(compat.dynamo_source(node)) or node.name
    kind = type(value).__name__
    placed = f" placed as {value.placements}" if hasattr(value, "placements") else ""
    more = f", and {len(wrapped) - 1} more" if wrapped[1:] else ""
    fact = f"'{name}' is a {kind}{placed}{more}; passes work on plain tensors"
    lossy = [p.name for p in pipeline.passes if p.tier is Tier.LOSSY]
    if lossy:
        raise UserError(
            f"pass '{lossy[0]}' cannot rewrite a graph with parameters of type {kind}",
            [fact],
            "leave the pass out, or run it on a model that is not parallelized",
        )
    log.warning("a graph runs as it was captured, without passes: %s", fact)
    return module.forward


def refuse_derived(program: Program) -> None:
    """Refuses weights that were derived from gathered parameters: they would go stale unnoticed.

    Raises:
        UserError: naming a parameter.
    """
    names = {name for expression in derived_reads(program) for name in expression.parameters()}
    sources = {name: program.sources[name].tensor for name in names}
    stale = compat.gathered(list(sources.values()))
    if stale:
        name = next(n for n, tensor in sources.items() if tensor is stale[0])
        raise UserError(
            f"weight '{name}' is gathered by fully_shard at each forward: what a pass derives from it cannot be kept",
            [f"{len(stale)} weights of this graph; PyTorch does not tell when one was gathered anew"],
            "name passes that leave weights as they are (raise,fuse), or run without fully_shard",
        )
