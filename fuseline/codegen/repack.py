"""Weights of codes in the layout of the tensor-core kernels, where a region's template will read them.

Before, in a region                                  after
    w = decode(codes, scale, …, "int3", 64, …)           w = decode_words(words, scaleᵀ, …, "int3", 64, 16, …)
    w = decode_pairs(codes, scale, …, "int4", …)         w = decode_pair_words(words, scaleᵀ, …, "int4", 64, 16, …)
    w = lowrank_add(w, up, down, ranks)                  w = lowrank_add(w, up, down, ranks, starts)

The words and the scales that lie across are weight expressions over those that the program has, bound and cached as
any other. Graphs keep the stored layout until here, which is what exports, saved models and eager read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..compiler import products
from ..compiler.compat_graphs import graph_module
from ..compiler.expert_expressions import PairsInWords
from ..compiler.expressions import Constant, Expression, InWords, Transpose
from ..compiler.formats.words import Words
from ..compiler.ops import decode_pair_words, decode_pairs, decode_words, dequantize, lowrank_add, moe
from ..compiler.schemes import Scheme
from ..compiler.traits import arguments, is_view
from .sizes import same
from .templates.coded.host import packs_pairs

PARTS = ("codes", "scale", "zero", "outer")
PAIR_PARTS = ("codes", "scale", "rows", "slots")
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
    copied = graph_module(region, graph, class_name=type(region).__name__)
    copied.meta.update(region.meta)
    return copied


def _linears(region: GraphModule) -> tuple[list[Any], bool]:
    """The weights of a region's linears, and whether they are multiplied with activations' codes."""
    linears = [n for n in region.graph.nodes if n.target is torch.ops.aten.linear.default]
    inputs = {n.args[0] for n in linears}
    return [n.args[1] for n in linears], any(products.activation(x) is not None for x in inputs if isinstance(x, Node))


def _experts(region: GraphModule) -> tuple[list[Any], bool]:
    """What a region's stacks of experts are decoded by."""
    found = []
    for node in region.graph.nodes:
        if node.target is moe.overload:
            for stack in (node.args[3], node.args[4]):
                while isinstance(stack, Node) and stack.op == "call_function" and _passes_on(stack):
                    stack = stack.args[0]
                found.append(stack)
    return found, False


def _passes_on(node: Node) -> bool:
    return is_view(node.target) or node.target is lowrank_add.overload


@dataclass(frozen=True)
class _Laid:
    """What takes the place of a decoding: its op, tensors by argument, and what follows these.

    parts: the expressions, and the values of the graph that they are made from.
    """

    op: Any
    parts: dict[str, tuple[Expression, Node]]
    tail: tuple[Any, ...]

    @staticmethod
    def of(node: Node, codes: bool, expressions: dict[Node, Expression]) -> _Laid:
        """expressions: of the region's inputs."""
        if node.target is decode_pairs.overload:
            return _Laid._pairs(node, expressions)
        given, run = products.words_of(node, codes)  # type: ignore[misc]
        rows, group, channels = int(given["codes"].meta["val"].shape[0]), given["group"], given["channels"]
        scheme = Scheme(given["format"], 0 if same(group, channels) else group, given["zero"] is None)
        found = {part: expressions[given[part]] for part in PARTS if given[part] is not None}
        if run:
            found["codes"] = InWords(found["codes"], scheme, rows, channels, run)
        found |= {part: Transpose(found[part], 0, 1) for part in ("scale", "zero") if part in found}
        return _Laid(
            decode_words,
            {part: (expression, given[part]) for part, expression in found.items()},
            (given["format"], group, run, given["dtype"]),
        )

    @staticmethod
    def _pairs(node: Node, expressions: dict[Node, Expression]) -> _Laid:
        given, run = arguments(node), products.pair_words_of(node)
        assert run is not None
        n, (count, height, groups) = given["n"], (int(size) for size in given["scale"].meta["val"].shape)
        found = {part: expressions[given[part]] for part in PAIR_PARTS}
        found["codes"] = PairsInWords(found["codes"], given["format"], count, height, n, run)
        found["scale"] = Transpose(found["scale"], 1, 2)
        return _Laid(
            decode_pair_words,
            {part: (expression, given[part]) for part, expression in found.items()},
            (given["format"], n // groups, run, given["dtype"]),
        )

    def arguments(self, placed: dict[str, Node]) -> tuple[Any, ...]:
        names = PARTS if self.op is decode_words else PAIR_PARTS
        return (*(placed.get(part) for part in names), *self.tail)


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
        if not decoded or not all(self._served(node, codes, outside) for node in decoded):
            return False
        if region.meta["kind"] == "linear" and len({products.words_of(n, codes)[1] for n in decoded}) > 1:  # type: ignore[index, arg-type]
            return False
        for node in dict.fromkeys(decoded):
            self._replace(node, codes, region, outside)
        for node in [n for n in region.graph.nodes if n.target is lowrank_add.overload]:
            self._number(node, region, outside)
        for node in [n for n in region.graph.nodes if n.op == "placeholder" and not n.users]:
            region.graph.erase_node(node)
        call.args = tuple(outside[n] for n in region.graph.nodes if n.op == "placeholder")
        region.recompile()
        return True

    def _served(self, node: object, codes: bool, outside: dict[Node, Node]) -> bool:
        if not isinstance(node, Node):
            return False
        if node.target is dequantize.overload and not codes and not packs_pairs(node.meta["val"].device):
            return False  # without tensor cores for the template, gemv and gemm serve int4 and int8
        if node.target is decode_pairs.overload:
            given = arguments(node) if products.pair_words_of(node) is not None else None
        else:
            found = products.words_of(node, codes)
            given = found and found[0]
        if given is None:
            return False
        parts = [given[part] for part in dict.fromkeys((*PARTS, *PAIR_PARTS)) if given.get(part) is not None]
        return all(p.op == "placeholder" and outside[p] in self.of_node for p in parts)

    def _replace(self, node: Node, codes: bool, region: GraphModule, outside: dict[Node, Node]) -> None:
        known = {inner: self.of_node[outer] for inner, outer in outside.items() if outer in self.of_node}
        laid = _Laid.of(node, codes, known)
        placed = {
            part: self._placed(expression, self._fake(like.meta["val"], expression), like, region, outside)
            for part, (expression, like) in laid.parts.items()
        }
        with region.graph.inserting_before(node):
            made = region.graph.call_function(laid.op.overload, laid.arguments(placed))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        region.graph.erase_node(node)

    def _number(self, node: Node, region: GraphModule, outside: dict[Node, Node]) -> None:
        """Has low ranks know on the device where each expert's begin."""
        given = arguments(node)
        starts, device = (0, *accumulate(given["ranks"])), node.meta["val"].device
        constant = Constant(starts, (len(starts),), torch.int32, str(device))
        fake = node.meta["val"].new_empty((len(starts),), dtype=torch.int32)
        made = self._placed(constant, fake, given["up"], region, outside)
        node.args = (given["base"], given["up"], given["down"], given["ranks"], made)

    @staticmethod
    def _fake(before: torch.Tensor, expression: Expression) -> torch.Tensor:
        if isinstance(expression, InWords):
            shape = Words(expression.scheme.bits, expression.run).shape(expression.rows, expression.n)
            return before.new_empty(shape, dtype=torch.int32)
        if isinstance(expression, PairsInWords):
            shape = expression.words.shape(expression.rows * expression.height, expression.n)
            return before.new_empty(shape, dtype=torch.int32)
        if isinstance(expression, Transpose):
            return before.new_empty(before.transpose(expression.first, expression.second).shape)
        return before

    def _placed(
        self, expression: Expression, fake: torch.Tensor, like: Node, region: GraphModule, outside: dict[Node, Node]
    ) -> Node:
        """The region's input for an expression; like: a value of the region that it stands for, or stands beside."""
        source = self._input(expression, fake, outside.get(like, like))
        known = next((inner for inner, outer in outside.items() if outer is source), None)
        return known or self._placeholder(region, source, fake, like, outside)

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
