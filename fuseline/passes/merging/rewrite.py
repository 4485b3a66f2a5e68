"""The graph of a merged layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.expert_expressions import Mixed, Paired
from ...compiler.expressions import Constant, Expression, Planned
from ...compiler.formats.pairs import ALONE
from ...compiler.plan import SitePlan
from ...compiler.rewriter import Builder, Rewriter
from .layers import Layer, Stack
from .milo import compensated
from .options import Method, Router
from .routing import numbered, router, without

if TYPE_CHECKING:
    from . import MergeExperts


def rewrite(step: MergeExperts, rewriter: Rewriter, layer: Layer, decided: SitePlan) -> None:
    """One rewrite of a layer as the plan has it."""
    builds = {Method.PUZZLE: _puzzle, Method.MILO: _milo}
    build = builds.get(step.method, _groups)
    rewriter.rewrite(layer.node, [layer.node], lambda new: build(step, new, layer, decided), step.method.value)


def _puzzle(step: MergeExperts, new: Builder, layer: Layer, decided: SitePlan) -> Node:
    pairs = tuple(tuple(pair) for pair in decided.structure["pairs"])
    device = str(layer.node.meta["val"].device)
    stacks = []
    for name, stack in (("gate_up", layer.gate_up), ("down", layer.down)):
        norms = Planned.of(decided.tensors[name], device) if name in decided.tensors else None
        stacks.append(new.weight(Paired(stack.weight, pairs, step.tau, norms, step.packed, stack.turned)))
    if not step.packed:
        return _call(new, layer, *stacks)
    rows, slots = [0] * layer.experts, [0] * layer.experts
    for row, pair in enumerate(pairs):
        for slot, e in enumerate(pair):
            rows[e], slots[e] = row, slot if len(pair) == 2 else ALONE
    places = [new.weight(Constant(tuple(v), (layer.experts,), torch.int32, device)) for v in (rows, slots)]
    given = layer.given
    front = [given[name] for name in ("hidden", "indices", "weights")]
    return new(ops.moe_pairs, *front, *stacks, *places, *_rest(given))


def _milo(step: MergeExperts, new: Builder, layer: Layer, decided: SitePlan) -> Node:
    scheme, factors = step.schemes()
    own = decided.structure["ranks"]
    stacks = [compensated(new, layer, s, scheme, factors, own, step.rounds) for s in (layer.gate_up, layer.down)]
    return _call(new, layer, *stacks)


def _groups(step: MergeExperts, new: Builder, layer: Layer, decided: SitePlan) -> Node:
    about, given = decided.structure, layer.given
    stacks = [new.weight(mixed(stack, decided)) for stack in (layer.gate_up, layer.down)]
    biases = [None if b is None else new.weight(mixed(Stack(b), decided)) for b in layer.biases]
    if step.routes is Router.MAP:
        places = {e: i for i, group in enumerate(about["groups"]) for e in group}
        indices = numbered(new, layer, given["indices"], [places[e] for e in range(layer.experts)])
        weights = given["weights"]
    else:
        found = router(layer)
        assert not isinstance(found, str)  # the decision says so
        indices, weights = without(new, layer, found, about["rows"])
    return new(ops.moe, given["hidden"], indices, weights, *stacks, *biases, *_rest(given)[2:])


def mixed(stack: Stack, decided: SitePlan) -> Expression:
    """The stack of what groups become."""
    groups, shares = (tuple(map(tuple, decided.structure[name])) for name in ("groups", "shares"))
    return Mixed(stack.weight, groups, shares, stack.turned)


def _call(new: Builder, layer: Layer, *stacks: Node) -> Node:
    given = layer.given
    return new(ops.moe, given["hidden"], given["indices"], given["weights"], *stacks, *_rest(given))


def _rest(given: dict[str, Any]) -> list[Any]:
    names = ("gate_up_bias", "down_bias", "activation", "interleaved", "alpha", "limit")
    return [given[name] for name in names]
