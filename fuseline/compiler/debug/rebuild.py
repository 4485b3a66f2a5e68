"""A program built again at other sizes or in other dtypes, its types worked out anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .. import compat
from ..program import Program, Source
from ..rewriter import fake_call, fake_weight

Resize = Callable[[int], int]


def rebuild(
    program: Program,
    static: bool = False,
    size: Resize = lambda n: n,
    dtypes: Mapping[torch.dtype, torch.dtype] | None = None,
) -> Program | None:
    """The program with its inputs, parameters and arguments changed; None where they no longer fit together.

    Args:
        static: symbolic sizes become the numbers that they had at capture.
        size: what becomes of each size, in shapes and in the graph's arguments; values are cut to fit.
        dtypes: which dtypes become which others.
    """
    if any(n.op == "call_module" for n in program.graph.nodes):
        return None
    try:
        return _Builder(program, static, size, dtypes or {}).run()
    except Exception:  # the new types do not fit together: PyTorch raises what it likes
        return None


class _Builder:
    def __init__(self, program: Program, static: bool, size: Resize, dtypes: Mapping[torch.dtype, torch.dtype]):
        self.old, self.static, self.size, self.dtypes = program, static, size, dtypes
        self.flat: list[Any] = []
        self.new: dict[Node, Any] = {}

    def run(self) -> Program:
        old, graph = self.old, Graph()
        program = replace(old, module=GraphModule(torch.nn.Module(), graph), arguments=[], examples=None)
        program.sources = {name: replace(s, tensor=self.tensor(s.tensor)) for name, s in old.sources.items()}
        types: dict[Any, Any] = {}
        for node in old.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node, program)
            elif node.op == "get_attr":
                value = fake_weight(program, node.meta["weight"], types)
                program.module.register_buffer(str(node.target), value, persistent=False)
                created = graph.get_attr(str(node.target))
                created.meta = {**node.meta, "val": value}
                self.new[node] = created
            elif node.op == "output":
                result = torch.fx.node.map_arg(node.args[0], lambda n: self.new[n])
                graph.output(result).meta["val"] = torch.fx.node.map_arg(result, lambda n: n.meta["val"])
            else:
                self.call(node, program)
        self.number(program)
        program.module.recompile()
        return program

    def placeholder(self, node: Node, program: Program) -> None:
        value = node.meta["val"]
        given = self.old.examples[self.old.arguments[len(self.flat)]] if self.old.examples is not None else None
        if isinstance(value, torch.Tensor):
            shape = [self.dim(s) for s in value.shape]
            with compat.on_fake_values(program.fake_mode):
                value = torch.empty(shape, dtype=self.dtype(value.dtype), device=value.device)
            given = self.tensor(given) if given is not None else None
        elif self.static and isinstance(value, torch.SymInt):
            self.new[node] = compat.size_hint(value) if given is None else int(given)
            self.flat.append(_DROPPED)
            return
        created = program.graph.placeholder(node.name)
        created.meta = {**node.meta, "val": value}
        self.new[node] = created
        self.flat.append(given)

    def call(self, node: Node, program: Program) -> None:
        args, kwargs = self.arguments(node.args), self.arguments(node.kwargs)
        value = fake_call(program, node.target, args, kwargs, node.meta.get("autocast", ()))  # type: ignore[arg-type]
        if isinstance(value, (bool, int, float)):
            self.new[node] = value
            return
        created = program.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        created.meta = {**node.meta, "val": value}
        self.new[node] = created

    def arguments(self, value: Any) -> Any:
        """Arguments over the new nodes, sizes and dtypes."""
        if isinstance(value, Node):
            return self.new[value]
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.arguments, value))
        if isinstance(value, dict):
            return {k: self.arguments(v) for k, v in value.items()}
        if isinstance(value, torch.dtype):
            return self.dtype(value)
        return self.size(value) if type(value) is int else value

    def tensor(self, value: Any) -> Any:
        """A tensor cut to its new shape, in its new dtype; whole numbers stay below the sizes that were cut."""
        if not isinstance(value, torch.Tensor):
            return value
        cut = value.detach()
        for dim, old in enumerate(value.shape):
            if isinstance(old, int) and self.size(old) != old:
                cut = cut.narrow(dim, 0, self.size(old))
        if cut.dtype in (torch.int32, torch.int64) and cut.numel() and isinstance(cut, torch.Tensor):
            largest = self.largest(cut)
            if largest is not None:
                cut = cut % largest
        return cut.to(self.dtype(cut.dtype)).clone(memory_format=torch.contiguous_format)

    def largest(self, tensor: torch.Tensor) -> int | None:
        """A bound for whole numbers that may index a dimension which was cut."""
        if isinstance(tensor, torch._subclasses.FakeTensor):
            return None
        above = int(tensor.max()) + 1
        bounds = [self.size(n) for n in self.cut_sizes() if n >= above > self.size(n)]
        return min(bounds, default=None)

    def cut_sizes(self) -> set[int]:
        tensors = [s.tensor for s in self.old.sources.values()]
        tensors += [n.meta["val"] for n in self.old.placeholders if isinstance(n.meta["val"], torch.Tensor)]
        return {s for t in tensors for s in t.shape if isinstance(s, int) and self.size(s) != s}

    def dim(self, size: Any) -> Any:
        if isinstance(size, torch.SymInt):
            return compat.size_hint(size) if self.static else size
        return self.size(size)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtypes.get(dtype, dtype)

    def number(self, program: Program) -> None:
        """Inputs first, then parameters, in the flat arguments."""
        flat = [value for value in self.flat if value is not _DROPPED]
        program.arguments = list(range(len(flat)))
        kept: dict[str, Source] = {}
        for position, (name, source) in enumerate(program.sources.items(), len(flat)):
            kept[name] = replace(source, index=position)
            flat.append(source.tensor)
        program.sources = kept
        program.examples = flat if self.old.examples is not None else None


_DROPPED = object()
