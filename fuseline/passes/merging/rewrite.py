"""The graph of a merged layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.expert_expressions import Mixed, Paired, PairedCodes
from ...compiler.expressions import Constant, Expression, Output, Planned
from ...compiler.formats.pairs import ALONE
from ...compiler.plan import SitePlan
from ...compiler.rewriter import Builder, Rewriter
from .layers import Layer, Stack
from .milo import compensated
from .options import Method, Pack, Router
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
    device, given = str(layer.node.meta["val"].device), layer.given
    rows, slots = [0] * layer.experts, [0] * layer.experts
    for row, pair in enumerate(pairs):
        for slot, e in enumerate(pair):
            rows[e], slots[e] = row, ALONE if len(pair) == 1 and step.pack is Pack.BF16 else slot
    places = [Constant(tuple(v), (layer.experts,), torch.int32, device) for v in (rows, slots)]
    stacks = []
    for name, stack in (("gate_up", layer.gate_up), ("down", layer.down)):
        norms = Planned.of(decided.tensors[name], device) if name in decided.tensors else None
        if step.pack in (Pack.BF16, Pack.NONE):
            packed = step.pack is Pack.BF16
            stacks.append(new.weight(Paired(stack.weight, pairs, step.tau, norms, packed, stack.turned)))
            continue
        n = int(given[name].meta["val"].shape[-1])
        group = step.group if step.group and n % step.group == 0 else 0
        made = PairedCodes(stack.weight, pairs, step.tau, step.pack.value, group, norms, stack.turned)
        parts = [new.weight(part) for part in (Output(made, "codes"), Output(made, "scale"), *places)]
        stacks.append(new(ops.decode_pairs, *parts, step.pack.value, n, given[name].meta["val"].dtype))
    if step.pack is not Pack.BF16:
        return _call(new, layer, *stacks)
    front = [given[name] for name in ("hidden", "indices", "weights")]
    return new(ops.moe_pairs, *front, *stacks, *(new.weight(place) for place in places), *_rest(given))


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
