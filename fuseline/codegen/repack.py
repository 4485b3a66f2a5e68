"""Weights of codes in the layout of the tensor-core kernels, where a region's template will read them.

Before, in a region                                  after
    w = decode(codes, scale, …, "int3", 64, …)           w = decode_words(words, scaleᵀ, …, "int3", 64, 16, …)

The words and the scales that lie across are weight expressions over those that the program has, bound and cached as
any other. Graphs keep the stored layout until here, which is what exports, saved models and eager read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..compiler import products
from ..compiler.expressions import Expression, InWords, Transpose
from ..compiler.formats.words import Words
from ..compiler.ops import decode_words, dequantize, moe
from ..compiler.schemes import Scheme
from ..compiler.traits import is_view
from .sizes import same

PARTS = ("codes", "scale", "zero", "outer")
KINDS = ("linear", "experts")


def repack(module: GraphModule, weights: Sequence[Expression]) -> list[Expression]:
    """Rewrites the regions of a lifted graph, in place; returns the expressions of its trailing inputs."""
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    of_node = dict(zip(inputs[len(inputs) - len(weights) :], weights, strict=True))
    layout = _Layout(module, of_node, inputs[-1] if inputs else None)
    for call in list(module.graph.nodes):
        region = module.get_submodule(str(call.target)) if call.op == "call_module" else None
        if isinstance(region, GraphModule) and region.meta.get("kind") in KINDS:
            changed = _copy(region)  # the program's own stays as it is
            if layout.rewrite(call, changed):
                module.add_submodule(str(call.target), changed)
    for node in list(of_node):
        if not node.users:
            module.graph.erase_node(node)
            del of_node[node]
    module.recompile()
    return list(of_node.values())


def _copy(region: GraphModule) -> GraphModule:
    """The region over a graph of its own; fake values are shared."""
    graph = Graph()
    output = graph.output(graph.graph_copy(region.graph, {}))
    output.meta = dict(next(iter(reversed(region.graph.nodes))).meta)
    copied = GraphModule(region, graph, class_name=type(region).__name__)
    copied.meta.update(region.meta)
    return copied


def _linears(region: GraphModule) -> tuple[list[Any], bool]:
    """The weights of a region's linears, and whether they are multiplied with activations' codes."""
    linears = [n for n in region.graph.nodes if n.target is torch.ops.aten.linear.default]
    inputs = {n.args[0] for n in linears}
    return [n.args[1] for n in linears], any(products.activation(x) is not None for x in inputs if isinstance(x, Node))


def _experts(region: GraphModule) -> tuple[list[Any], bool]:
    """What a region's stacks of experts are views of."""
    found = []
    for node in region.graph.nodes:
        if node.target is moe.overload:
            for stack in (node.args[3], node.args[4]):
                while isinstance(stack, Node) and stack.op == "call_function" and is_view(stack.target):
                    stack = stack.args[0]
                found.append(stack)
    return found, False


class _Layout:
    """One lifted graph while its regions are rewritten."""

    def __init__(self, module: GraphModule, of_node: dict[Node, Expression], last: Node | None):
        self.module, self.of_node, self.last = module, of_node, last
        self.nodes = {expression: node for node, expression in of_node.items()}

    def rewrite(self, call: Node, region: GraphModule) -> bool:
        """Lays out all weights of a region, or none: a template reads one layout. Whether it did."""
        inside = [n for n in region.graph.nodes if n.op == "placeholder"]
        outside: dict[Node, Node] = dict(zip(inside, call.args, strict=True))  # type: ignore[arg-type]
        decoded, codes = _linears(region) if region.meta["kind"] == "linear" else _experts(region)
        if not decoded or not all(self._served(node, codes, outside, region) for node in decoded):
            return False
        runs = {products.words_of(n, codes)[1] for n in decoded}  # type: ignore[index, arg-type]
        if len(runs) > 1 and region.meta["kind"] == "linear":
            return False
        for node in dict.fromkeys(decoded):
            self._replace(node, codes, region, outside)
        for node in [n for n in region.graph.nodes if n.op == "placeholder" and not n.users]:
            region.graph.erase_node(node)
        call.args = tuple(outside[n] for n in region.graph.nodes if n.op == "placeholder")
        region.recompile()
        return True

    def _served(self, node: object, codes: bool, outside: dict[Node, Node], region: GraphModule) -> bool:
        if region.meta["kind"] == "linear" and not codes and getattr(node, "target", None) is dequantize.overload:
            return False  # gemv and gemm serve int4 and int8: a whole step of batch 1 is faster (docs/benchmarks.md)
        found = products.words_of(node, codes) if isinstance(node, Node) else None
        if found is None:
            return False
        given, _ = found
        parts = [given[part] for part in PARTS if given[part] is not None]
        return all(p.op == "placeholder" and outside[p] in self.of_node for p in parts)

    def _replace(self, node: Node, codes: bool, region: GraphModule, outside: dict[Node, Node]) -> None:
        given, run = products.words_of(node, codes)  # type: ignore[misc]
        zero = given["zero"]
        rows, group, channels = int(given["codes"].meta["val"].shape[0]), given["group"], given["channels"]
        scheme = Scheme(given["format"], 0 if same(group, channels) else group, zero is None)
        expressions = {part: self.of_node[outside[given[part]]] for part in PARTS if given[part] is not None}
        if run:
            expressions["codes"] = InWords(expressions["codes"], scheme, rows, channels, run)
        for part in ("scale", "zero"):
            if part in expressions:
                expressions[part] = Transpose(expressions[part], 0, 1)
        fakes = {part: self._fake(part, given[part].meta["val"], expressions[part]) for part in expressions}
        placed: dict[str, Node] = {}
        for part, expression in expressions.items():
            source = self._input(expression, fakes[part], outside[given[part]])
            known = next((inner for inner, outer in outside.items() if outer is source), None)
            placed[part] = known or self._placeholder(region, source, fakes[part], given[part], outside)
        with region.graph.inserting_before(node):
            made = region.graph.call_function(
                decode_words.overload,
                (*(placed.get(part) for part in PARTS), given["format"], group, run, given["dtype"]),
            )
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        region.graph.erase_node(node)

    @staticmethod
    def _fake(part: str, before: torch.Tensor, expression: Expression) -> torch.Tensor:
        if isinstance(expression, InWords):
            shape = Words(expression.scheme.bits, expression.run).shape(expression.rows, expression.n)
            return before.new_empty(shape, dtype=torch.int32)
        return before.new_empty(before.shape[::-1]) if part in ("scale", "zero") else before

    def _input(self, expression: Expression, fake: torch.Tensor, like: Node) -> Node:
        """The graph's input for an expression; a new one follows the others."""
        if expression not in self.nodes:
            assert self.last is not None
            with self.module.graph.inserting_after(self.last):
                self.last = self.module.graph.placeholder(f"laid_{len(self.nodes)}_{like.name}")
            self.last.meta = {**like.meta, "val": fake, "weight": expression}
            self.nodes[expression] = self.last
            self.of_node[self.last] = expression
        return self.nodes[expression]

    @staticmethod
    def _placeholder(
        region: GraphModule, source: Node, fake: torch.Tensor, like: Node, outside: dict[Node, Node]
    ) -> Node:
        last = [n for n in region.graph.nodes if n.op == "placeholder"][-1]
        with region.graph.inserting_after(last):
            made = region.graph.placeholder(source.name)
        made.meta = {**like.meta, "val": fake}
        outside[made] = source
        return made
