"""Attention for some of its key heads at a time: what its backward has for itself is for those heads alone."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial

import torch
from torch.fx import Node

from ...compiler.compat import size_hint
from ...compiler.ops import attention
from ...compiler.program import Program
from ...compiler.regions import region_of
from ...compiler.rewriter import Builder, Rewriter
from ...compiler.traits import arguments

GROUPS = 4
"""Groups of heads, where the number is not given: what a backward has for itself is small beside its inputs then."""


def split_heads(program: Program, rewriter: Rewriter, count: int, least: int) -> None:
    """Attention in `count` groups of key heads; with 0 in GROUPS, or fewer, where at least so many positions attend."""
    for node in list(_attentions(program)):
        given = arguments(node)
        heads, length = given["k"].meta["val"].shape[1], size_hint(given["q"].meta["val"].shape[2])
        groups = count or (_divisor(heads) if length >= least else 1)
        if groups < 2:
            continue
        reason = _refusal(node, heads, groups)
        if reason is not None:
            rewriter.refuse(node, reason, "heads")
            continue
        rewriter.rewrite(node, [node], partial(_grouped, node=node, groups=groups), "heads apart")


def _attentions(program: Program) -> Iterator[Node]:
    return (n for n in program.graph.nodes if n.op == "call_function" and n.target is attention.overload)


def _divisor(heads: int) -> int:
    return next(n for n in range(GROUPS, 0, -1) if heads % n == 0)


def _refusal(node: Node, heads: int, groups: int) -> str | None:
    if region_of(node) is not None:
        return "it is part of a region of torch.utils.checkpoint"
    if arguments(node).get("dropout"):
        return "groups of heads would draw other random numbers"
    if heads % groups:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        return f"{heads} key heads do not fall into {groups} groups: heads={fitting or 1} would"
    return None


def _grouped(new: Builder, node: Node, groups: int) -> Node:
    given = arguments(node)
    parts = {name: _parts(new, given[name], groups, 1) for name in ("q", "k", "v")}
    if (mask := given.get("mask")) is not None:
        shape = mask.meta["val"].shape
        parts["mask"] = [mask] * groups if len(shape) < 3 or shape[-3] == 1 else _parts(new, mask, groups, -3)
    rest = {k: v for k, v in given.items() if k not in parts}
    found = [new(attention, **{k: p[i] for k, p in parts.items()}, **rest) for i in range(groups)]
    return new(torch.ops.aten.cat.default, found, 1)


def _parts(new: Builder, x: Node, groups: int, dim: int) -> list[Node]:
    """Groups of heads, as views whose gradients are put together by one `cat`."""
    split = new(torch.ops.aten.split.Tensor, x, x.meta["val"].shape[dim] // groups, dim)
    return [new(operator.getitem, split, i) for i in range(groups)]
