"""Running a program on all calibration batches at once, node by node, and stopping where a weight is to be quantized.

    for stop in Stream(program, data).stops(groups):      each value before the stop is there, for every batch
        … stop.x … stop.set(site, matrix)                 from here on, this site multiplies by the rounded matrix

One pass over the graph in its own order does for the whole model what re-running it for each layer would: a site sees
what the sites before it leave behind. Memory: a value is kept until its last use, so that besides the parameters there
are, at any time, the values that cross one place of the graph (in a transformer the residual stream, masks and the
inputs of one product), times the number of batches; with `offload` these are on the CPU, and those of one batch on the
device. Weights are evaluated where they are used, one at a time, and what no site depends on (a head) is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ...compiler.errors import UserError
from ...compiler.order import dependencies, touches_written
from ...compiler.program import Program
from ..quantize_sites import Site

Value = list[Any]
"""A node's value on each batch; one item where all batches have the same."""


@dataclass(frozen=True)
class Stop:
    """Sites that read one value, all before any of them has run.

    x: gives that value on each batch, in order; weight: a site's matrix [out, in]; set: what the site multiplies by
    instead.
    """

    sites: tuple[Site, ...]
    x: Callable[[], Iterator[torch.Tensor]]
    set: Callable[[Site, torch.Tensor], None]
    weight: Callable[[Site], torch.Tensor]


class Stream:
    """See above.

    Args:
        data: flat arguments of one call each.

    Raises:
        UserError: there is no batch, or one is on another device than the program, or of other sizes.
    """

    def __init__(self, program: Program, data: Sequence[Sequence[Any]], offload: bool = False):
        check(program, data)
        self.program, self.data, self.offload = program, data, offload
        self.values: dict[Node, Value] = {}
        self.rounded: dict[Node, torch.Tensor] = {}
        self.arguments = {n: program.arguments[i] for i, n in enumerate(program.placeholders)}

    @torch.no_grad()
    def stops(self, groups: Sequence[tuple[Site, ...]]) -> Iterator[Stop]:
        """Stops once a group, in the order of the graph."""
        first = {group[0].node: group for group in groups}
        wanted = self._wanted([site.node for group in groups for site in group])
        last = self._last_uses(wanted, groups)
        for node in self.program.graph.nodes:
            if node in first:
                yield self._stop(first[node], wanted)
            if node in wanted and "weight" not in node.meta:
                self.values[node] = self._run(node)
            for gone in last.get(node, ()):
                self.values.pop(gone, None)
        self.values.clear()

    def _stop(self, group: tuple[Site, ...], wanted: set[Node]) -> Stop:
        def x() -> Iterator[torch.Tensor]:
            for number in range(len(self.data)):
                yield self._read(group[0].x, number)

        def put(site: Site, matrix: torch.Tensor) -> None:
            if site.node in wanted:
                self.rounded[site.node] = matrix

        return Stop(group, x, put, lambda site: site.weight.evaluate(self._parameter))

    def _wanted(self, products: Sequence[Node]) -> set[Node]:
        """What has to run before these products: what they read, and what writes to it in place."""
        before, found = dependencies(self.program.graph), set[Node]()
        pending = [n for node in products for n in before[node]]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += before[node]
        return found

    def _last_uses(self, wanted: set[Node], groups: Sequence[tuple[Site, ...]]) -> dict[Node, list[Node]]:
        """For each node, what is read by it and by none after it."""
        readers = {group[0].node: group[0].x for group in groups}
        seen, last = set[Node](), dict[Node, list[Node]]()
        for node in reversed(self.program.graph.nodes):
            read = [*(node.all_input_nodes if node in wanted else ()), *([readers[node]] if node in readers else ())]
            fresh = [n for n in dict.fromkeys(read) if n not in seen]
            seen.update(fresh)
            last[node] = fresh
        return last

    def _run(self, node: Node) -> Value:
        if node.op == "placeholder":
            return [self._keep(node, flat[self.arguments[node]]) for flat in self.data]
        if node.op == "get_attr":
            return [getattr(self.program.module, str(node.target))]
        target: Any = self.program.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        rounded = self.rounded.pop(node, None)
        given = node.args if rounded is None else with_weight(node, rounded)
        alike = all("weight" in n.meta or len(self.values[n]) == 1 for n in node.all_input_nodes)
        shared = alike and not node.is_impure() and not touches_written(node)  # no batch writes to another's
        found = []
        for number in range(1 if shared else len(self.data)):
            args, kwargs = map_arg((given, node.kwargs), lambda n, number=number: self._read(n, number))  # type: ignore[misc]
            found.append(self._keep(node, target(*args, **kwargs)))
        return found

    def _all(self, node: Node) -> Value:
        if node not in self.values:
            self.values[node] = [node.meta["weight"].evaluate(self._parameter)]
        return self.values[node]

    def _read(self, node: Node, number: int) -> Any:
        values = self._all(node)
        value = values[0 if len(values) == 1 else number]
        if self.offload and isinstance(value, torch.Tensor) and not touches_written(node):
            return value.to(node.meta["val"].device)
        return value

    def _keep(self, node: Node, value: Any) -> Any:
        """What is written to in place stays where it is: a copy would not see it."""
        leaves = self.offload and isinstance(value, torch.Tensor) and not touches_written(node)
        return value.cpu() if leaves else value

    def _parameter(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.data[0][self.program.sources[name].index].detach()
        return found


def with_weight(node: Node, matrix: torch.Tensor) -> tuple[Any, ...]:
    """A product's arguments with another matrix [out, in] in the place of its weight, laid out as that one is."""
    args, position = list(node.args), 2 if node.target is torch.ops.aten.addmm.default else 1
    sizes = [int(size) for size in args[position].meta["val"].shape]  # type: ignore[union-attr]
    transposed = node.target is not torch.ops.aten.linear.default and len(sizes) == 2
    args[position] = (matrix.t() if transposed else matrix).reshape(sizes)  # type: ignore[call-overload]
    return tuple(args)


def check(program: Program, data: Sequence[Sequence[Any]]) -> None:
    """Refuses batches that the program cannot be run on."""
    if not data:
        raise UserError("calibration holds no batch", remedy="calibration=[(input_ids,), …]")
    for number, flat in enumerate(data):
        for node, position in zip(program.placeholders, program.arguments, strict=True):
            given, expected = flat[position], node.meta["val"]
            if not isinstance(given, torch.Tensor) or not isinstance(expected, torch.Tensor):
                continue
            if given.device != expected.device:
                raise UserError(
                    f"calibration batch {number} is on {given.device}, and the model on {expected.device}",
                    [f"input '{node.name}'"],
                    f"move it: batch.to('{expected.device}')",
                )
            sizes = zip(given.shape, expected.shape, strict=False)
            if given.dim() != expected.dim() or any(isinstance(b, int) and a != b for a, b in sizes):
                raise UserError(
                    f"calibration batch {number} has sizes {list(given.shape)}, and the first {list(expected.shape)}",
                    [f"input '{node.name}'"],
                    "cut all batches to the same sizes",
                )
