"""From a proved mask to arguments of `fuseline::attention`: a padding tensor [B, 1, 1, T], an offset, a window."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ...compiler.index_algebra import Linear
from ...compiler.index_reader import Reader
from ...compiler.rewriter import Builder
from .masks import Claim

aten = torch.ops.aten


class MaskArguments:
    """Builds arguments; what was made for one layer serves the later ones."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self._built: dict[Any, Node] = {}

    def can_build(self, claim: Claim, before: Node) -> bool:
        """Whether the graph has, before that node, the sizes that the claim speaks of."""
        return all(f.value is not None or self._sizes(f, before) is not None for f in (claim.offset, claim.window))

    def build(self, claim: Claim, new: Builder, before: Node) -> tuple[Node | None, Any, Any]:
        """mask, offset and window."""
        mask = self._padding(claim.padding, new) if claim.padding else None
        return mask, self._size(claim.offset, new, before), self._size(claim.window, new, before)

    def _reuse(self, key: Any) -> Node | None:
        node = self._built.get(key)
        return None if node is None or node._erased else node

    def _padding(self, padding: tuple[Node, bool], new: Builder) -> Node:
        built = self._reuse(padding)
        if built is None:
            node, positive = padding
            built = node if positive else new(aten.logical_not.default, node)
            while (rank := built.meta["val"].dim()) < 4:
                built = new(aten.unsqueeze.default, built, 0 if rank == 1 else 1)
            self._built[padding] = built
        return built

    def _size(self, form: Linear, new: Builder, before: Node) -> Any:
        if form.value is not None:
            return form.value
        built = self._reuse(form)
        if built is None:
            whole = self._known(before).get(form)
            built = whole if isinstance(whole, Node) else self._sum(form, new, before)
            self._built[form] = built
        return built

    def _sum(self, form: Linear, new: Builder, before: Node) -> Node:
        total: Any = None
        for place, factor in self._sizes(form, before) or ():
            size = place if isinstance(place, Node) else new(aten.sym_size.int, *place)
            if total is not None and factor == -1:
                total = new(operator.sub, total, size)
                continue
            scaled = size if factor == 1 else new(operator.mul, size, factor)
            total = scaled if total is None else new(operator.add, total, scaled)
        return new(operator.add, total, form.constant) if form.constant else total

    def _sizes(self, form: Linear, before: Node) -> list[tuple[Any, int]] | None:
        """Where each size of the form is found, those with a positive factor first."""
        known = self._known(before)
        terms = sorted(form.terms, key=lambda term: (-term[1], str(term[0])))
        found = [(known.get(Linear.of(atom)), factor) for atom, factor in terms]
        return None if any(place is None for place, _ in found) else found

    def _known(self, before: Node) -> dict[Linear, Node | tuple[Node, int]]:
        """Sizes in the graph: nodes that compute them, else a dimension of an input."""
        known: dict[Linear, Node | tuple[Node, int]] = {}
        for node in self._reader.program.graph.nodes:
            if node is before:
                break
            if isinstance(node.meta.get("val"), torch.SymInt):
                known.setdefault(self._reader.size(node), node)
        for node in self._reader.program.placeholders:
            if isinstance(node.meta["val"], torch.Tensor):
                for dim, size in enumerate(node.meta["val"].shape):
                    known.setdefault(self._reader.size(size), (node, dim))
        return known
