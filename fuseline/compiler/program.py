"""Program: one FX graph in normal form, with what a pass needs and nothing it doesn't.

Normal form: `aten.*` overloads before dispatch, `fuseline.*` dialect ops, functional collectives, arithmetic on
SymInts; weights are `get_attr` nodes whose `meta["weight"]` is a weight expression; every node has `meta["val"]`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from .binder import Binder
from .compat import real_tensors
from .compat_graphs import graph_module
from .expressions import Expression, Param
from .weights import STORE, WeightStore

TRAINS = "quantization-aware"
"""In `Program.state`: what approximates is to be put in with a gradient, for training (`fuseline.prepare_qat`)."""

JOINT = "joint"
"""In `Program.state`: the graph is a forward and its backward (`joint.py`)."""


@dataclass(frozen=True)
class Source:
    """A parameter or buffer that the graph reads: where the caller finds it at run time."""

    name: str
    index: int  # position in the caller's flat arguments
    tensor: torch.Tensor  # as it was at capture; passes may look, never write
    trainable: bool = False
    constant: bool = False  # written down in the model's code, and nobody's to replace


@dataclass
class Program:
    """A captured graph.

    module: the graph; its placeholders are the caller's non-state arguments, in order.
    arguments: for each placeholder, its position in the caller's flat arguments.
    sources: parameters by qualified name.
    mutated: names of the placeholders that the graph writes to (a KV cache).
    training: whether gradients are wanted through the graph.
    examples: the caller's flat arguments at capture, where they are known; for numerics and offline analysis.
    ends_at: the graph break behind which another graph goes on, if Dynamo captured only a part.
    """

    module: GraphModule
    fake_mode: FakeTensorMode
    arguments: list[int]
    sources: dict[str, Source]
    mutated: frozenset[str] = frozenset()
    training: bool = False
    examples: Sequence[Any] | None = None
    state: frozenset[str] = frozenset()  # invariants that passes have established
    call: Callable[[Callable[..., Any]], torch.nn.Module] | None = field(default=None, repr=False)
    ends_at: str | None = None

    @property
    def graph(self) -> Graph:
        return self.module.graph

    @property
    def placeholders(self) -> list[Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def weights(self) -> list[Node]:
        """The weight nodes, in graph order."""
        return [n for n in self.graph.nodes if n.op == "get_attr" and "weight" in n.meta]

    def __len__(self) -> int:
        return len(self.graph.nodes)

    def copy(self) -> Program:
        """A copy whose graph can be rewritten without touching this one; tensors and fake values are shared."""
        graph = Graph()
        mapping: dict[Node, Node] = {}
        output = graph.graph_copy(self.graph, mapping)
        node = graph.output(output)
        original = next(iter(reversed(self.graph.nodes)))
        node.meta = copy.copy(original.meta)
        module = graph_module(self.module, graph)
        module.meta.update(self.module.meta)
        return Program(
            module, self.fake_mode, list(self.arguments), dict(self.sources), self.mutated, self.training,
            self.examples, self.state, self.call, self.ends_at,
        )  # fmt: skip

    def without_tensors(self) -> Program:
        """The same graph to keep and read later: it holds neither parameters nor inputs, so it keeps no model alive."""
        with real_tensors():
            sources = {n: replace(s, tensor=torch.empty_like(s.tensor, device="meta")) for n, s in self.sources.items()}
        return replace(self, sources=sources, examples=None, call=None)

    @staticmethod
    def from_fx(module: GraphModule, args: Sequence[Any]) -> Program:
        """A program from any FX graph module (`torch.fx.symbolic_trace`, …) and example inputs."""
        from .capture import from_graph_module

        return from_graph_module(module, args)

    def lift(self) -> tuple[GraphModule, list[Expression]]:
        """The graph with each weight as a trailing input, and those weights' expressions in the same order.

        Weights that stand for the same expression become one input, so tied parameters stay tied.
        """
        lifted = self.copy()
        graph = lifted.graph
        last = lifted.placeholders[-1] if lifted.placeholders else None
        inputs: dict[Expression, Node] = {}
        for node in lifted.weights():
            expression = node.meta["weight"]
            if expression not in inputs:
                with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes))):
                    last = graph.placeholder(f"weight_{node.name}" if node.name == node.target else str(node.target))
                last.meta = {k: v for k, v in node.meta.items() if k != "weight"}
                last.meta["weight"] = expression
                inputs[expression] = last
            node.replace_all_uses_with(inputs[expression])
            graph.erase_node(node)
        lifted.module.recompile()
        return lifted.module, list(inputs)

    def binder(self, expressions: Sequence[Expression], store: WeightStore = STORE) -> Binder:
        """A binder for weights of this program, reading parameters from the caller's flat arguments."""
        return Binder(expressions, {name: source.index for name, source in self.sources.items()}, store)

    def run(self, flat: Sequence[Any], store: WeightStore = STORE) -> Any:
        """Runs the graph in eager on the caller's flat arguments; returns the flat outputs."""
        module, expressions = self.lift()
        weights = self.binder(expressions, store)(flat)
        return module(*[flat[i] for i in self.arguments], *weights)

    def to_module(self) -> torch.nn.Module:
        """A module called like the captured one, running this graph in eager with the live parameters."""
        if self.call is None:
            raise TypeError("this program came from a backend; it runs through the callable handed back to Dynamo")
        module, expressions = self.lift()
        binder, positions = self.binder(expressions), self.arguments
        return self.call(lambda *flat: module(*[flat[i] for i in positions], *binder(flat)))

    def weight_bytes(self) -> int:
        """Bytes of what the weight nodes stand for, shared ones once."""
        values = {n.meta["weight"]: n.meta["val"] for n in self.weights()}
        return sum(v.numel() * v.element_size() for v in values.values())

    def parameter(self, node: Node) -> Param | None:
        """The parameter that a weight node is, when it is one unchanged."""
        expression = node.meta.get("weight") if node.op == "get_attr" else None
        return expression if isinstance(expression, Param) else None
