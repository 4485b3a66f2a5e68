"""Values: what a program's nodes compute on its example inputs, recorded where somebody needs them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Interpreter, Node

from ..compat import real_tensors, size_hint
from ..precision import clone
from ..program import Program

ALL_AT_ONCE = 1 << 29  # bytes of values that are kept from one run


class Values:
    """The values of one program's nodes, by name. Runs the program when a value is asked for that is not there yet."""

    def __init__(self, program: Program):
        self.program = program
        self._known: dict[str, Any] = {}

    def of(self, nodes: Iterable[Node]) -> dict[str, Any]:
        """Copies of these nodes' values, as they were right after each was computed."""
        names = [node.name for node in nodes]
        missing = {name for name in names if name not in self._known}
        if missing:
            everything = sum(map(_bytes, self.program.graph.nodes)) <= ALL_AT_ONCE
            self._known.update(record(self.program, None if everything else missing))
        return {name: self._known[name] for name in names}


def record(program: Program, names: set[str] | None = None) -> dict[str, Any]:
    """The values of the nodes of these names (None: of all) when the program runs on its example inputs."""
    assert program.examples is not None
    flat = [clone(x) for x in program.examples]
    module, expressions = program.lift()
    found: dict[str, Any] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if names is None or n.name in names:
                found[n.name] = clone(result)
            return result

    with real_tensors():
        weights = program.binder(expressions)(flat)
        Recorder(module).run(*[flat[i] for i in program.arguments], *weights)
        by_expression = dict(zip(expressions, weights, strict=True))
        for node in program.weights():  # lifted, they have other names
            if names is None or node.name in names:
                found[node.name] = clone(by_expression[node.meta["weight"]])
    return found


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or node.op == "get_attr":
        return 0
    return math.prod(map(size_hint, value.shape)) * value.element_size()
