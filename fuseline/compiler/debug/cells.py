"""A program as a flat list of cells, regions opened, whose values are computed one by one and let go again.

A cell is computed in the program's own precision or in float64 (*wide*): there inputs, weights, the dtypes that the
graph writes down and the results are promoted, and autocast is left out.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate, map_arg

from ..expressions import Expression, Memo, Param
from ..precision import clone, widen
from ..program import Program
from ..traits import arguments
from ..weights import STORE, WeightStore

Wider = dict[torch.dtype, torch.dtype]
_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")


@dataclass(eq=False, slots=True)
class Cell:
    """One computation.

    kind: "input" (target: its position in the flat arguments), "weight" (target: an expression), "call", "mode"
    (changes no value), "output", or "reference" (target: a cell of another program, whose value it takes).
    """

    name: str
    kind: str
    target: Any
    node: Node | None = None
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    region: str = ""
    position: int = -1
    inputs: tuple[Cell, ...] = ()

    def read(self) -> Cell:
        """Notes which cells the arguments hold."""
        found: dict[Cell, None] = {}
        map_aggregate((self.args, self.kwargs), lambda a: found.setdefault(a) if isinstance(a, Cell) else None)
        self.inputs = tuple(found)
        return self

    @property
    def autocast(self) -> tuple[Any, ...]:
        return self.node.meta.get("autocast", ()) if self.node is not None else ()

    @property
    def writes(self) -> bool:
        """Whether it writes in place."""
        schema = getattr(self.target, "_schema", None)
        return self.kind == "call" and schema is not None and bool(schema.is_mutable)


@dataclass
class Flat:
    """A program's cells in the order in which they run; `of` says which cell, or tuple of cells, a node's value is."""

    program: Program
    cells: list[Cell]
    of: dict[Node, Any]

    @property
    def results(self) -> list[Any]:
        """What the program returns, flat: cells, and literals."""
        return torch.utils._pytree.tree_leaves(self.cells[-1].args) if self.cells else []

    @property
    def outputs(self) -> list[Cell]:
        return [r for r in self.results if isinstance(r, Cell)]

    @property
    def mutated(self) -> list[Cell]:
        """The inputs that the program writes to."""
        names = self.program.mutated
        return [c for c in self.cells if c.kind == "input" and c.node is not None and c.node.name in names]


def flatten(program: Program) -> Flat:
    """The cells of a program, those of its regions among them."""
    flat = Flat(program, [], {})
    positions = dict(zip(program.placeholders, program.arguments, strict=True))
    _walk(program.module, flat, "", {}, positions)
    for position, cell in enumerate(flat.cells):
        cell.position = position
    return flat


def _walk(module: GraphModule, flat: Flat, region: str, values: dict[Node, Any], positions: dict[Node, int]) -> Any:
    """Adds the cells of one graph; returns what a region gives back."""
    result = None
    for node in module.graph.nodes:
        if node.op == "placeholder" and region:
            continue
        inner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op == "output" and region:
            result = map_arg(node.args[0], values.__getitem__)
        elif isinstance(inner, GraphModule):
            inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
            given = [values[a] if isinstance(a, Node) else a for a in node.args]
            path = f"{region}/{node.target}".lstrip("/")
            values[node] = _walk(inner, flat, path, dict(zip(inputs, given, strict=True)), positions)
        elif node.target is operator.getitem and isinstance(values.get(node.args[0]), (tuple, list)):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = cell_of(node, region, positions.get(node), values.__getitem__, inner)
            flat.cells.append(values[node])
        flat.of[node] = values.get(node)
    return result


def cell_of(
    node: Node, region: str, position: int | None, value: Callable[[Node], Any], module: torch.nn.Module | None = None
) -> Cell:
    """One node as a cell; `value` says which cell an argument is, `module` what a call_module calls."""
    if node.op == "placeholder":
        return Cell(node.name, "input", position, node, region=region)
    if node.op == "get_attr":
        return Cell(node.name, "weight", node.meta.get("weight", node.target), node, region=region)
    args, kwargs = map_arg((node.args, node.kwargs), value)
    target = module if node.op == "call_module" else node.target
    mode = getattr(target, "__name__", "") in _MODES
    kind = "output" if node.op == "output" else "mode" if mode else "call"
    return Cell(node.name, kind, target, node, args, kwargs, region).read()


class Weights:
    """The values of a program's weights, evaluated one at a time; the last few are kept."""

    KEPT = 8

    def __init__(self, program: Program, flat: Sequence[Any], wider: Wider, store: WeightStore = STORE):
        self.program, self.flat, self.wider, self.store = program, flat, wider, store
        self._memo: tuple[tuple[str, ...], Memo] = ((), {})
        self._own: dict[Any, torch.Tensor] = {}
        self._wide: dict[Any, torch.Tensor] = {}

    def __call__(self, expression: Expression | str) -> Any:
        if isinstance(expression, str):
            return operator.attrgetter(expression)(self.program.module)
        names = tuple(expression.parameters())
        tensors = [self.flat[self.program.sources[name].index] for name in names]
        if isinstance(expression, Param):
            return tensors[0].detach()
        if not names:
            return expression.evaluate(_no_parameter)
        if expression in self._own:
            return self._own[expression]
        if self._memo[0] != names:  # codes, scales and zero points of one parameter follow each other
            self._memo = (names, {})
        return self._keep(self._own, expression, self.store.peek(expression, tensors, self._memo[1]).detach())

    def wide(self, expression: Expression | str) -> Any:
        """The value, promoted."""
        if expression not in self._wide:
            self._keep(self._wide, expression, widen(self(expression), self.wider))
        return self._wide[expression]

    def _keep(self, held: dict[Any, torch.Tensor], expression: Any, value: torch.Tensor) -> torch.Tensor:
        while len(held) >= self.KEPT:
            held.pop(next(iter(held)))
        held[expression] = value
        return value


def _no_parameter(name: str) -> torch.Tensor:
    raise KeyError(name)


def compute(cell: Cell, value: Callable[[Cell], Any], wider: Wider | None = None, apart: bool = False) -> Any:
    """The value of a call.

    Args:
        value: the values of its inputs.
        wider: computes in higher precision.
        apart: on copies of what it writes to, so that the inputs stay as they are.
    """

    def given(argument: Any) -> Any:
        if isinstance(argument, Cell):
            found = value(argument)
            return clone(found) if apart and cell.writes else found
        return wider.get(argument, argument) if wider is not None and isinstance(argument, torch.dtype) else argument

    args, kwargs = map_aggregate((cell.args, cell.kwargs), given)
    if wider is not None:
        target = cell.target
        result = _Wide(target, wider).run(*args) if isinstance(target, GraphModule) else target(*args, **kwargs)
        return torch.utils._pytree.tree_map(lambda x: widen(x, wider), result)
    with contextlib.ExitStack() as regions:
        for region in cell.autocast:
            regions.enter_context(torch.autocast(*region))
        return cell.target(*args, **kwargs)


class _Wide(Interpreter):
    """Runs a region as one cell, promoted."""

    def __init__(self, module: GraphModule, wider: Wider):
        super().__init__(module)
        self._wider = wider

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_aggregate(
            (args, kwargs), lambda a: self._wider.get(a, a) if isinstance(a, torch.dtype) else a
        )
        return super().call_function(target, args, kwargs)


@dataclass(eq=False)
class Fragment:
    """A small computation: cells, inputs first, and the one whose value is asked for.

    A "reference" cell, or an input of a cell that is not among them, is a value of the captured program.
    """

    cells: list[Cell]
    root: Cell

    def reads(self) -> Iterator[Cell]:
        """The captured cells that it starts from."""
        members = set(self.cells)
        for cell in self.cells:
            if cell.kind == "reference":
                yield cell.target
            else:
                yield from (i for i in cell.inputs if i not in members)

    def value(self, start: Callable[[Cell], Any], weight: Callable[[Any], Any], wider: Wider | None = None) -> Any:
        """Computes it. `start` gives the values that it starts from, by the cell that reads them."""
        values: dict[Cell, Any] = {}

        def read(cell: Cell) -> Any:
            return values[cell] if cell in values else start(cell)

        for cell in self.cells:
            if cell.kind == "weight":
                values[cell] = weight(cell.target)
            elif cell.kind == "call":
                values[cell] = compute(cell, read, wider, apart=True)
        return read(self.root)


def upwards(root: Cell, stop: Callable[[Cell], bool]) -> list[Cell]:
    """A cell and what it is computed from, inputs first, no further than where `stop` says so."""
    found: dict[Cell, None] = {}
    pending = [(root, False)]
    while pending:
        cell, ready = pending.pop()
        if cell in found:
            continue
        if ready or not cell.inputs or stop(cell):
            found[cell] = None
        else:
            pending.append((cell, True))
            pending += [(i, False) for i in cell.inputs]
    return list(found)


def random_cell(cells: Iterable[Cell]) -> Cell | None:
    """The first cell that draws random numbers; attention or dropout at probability zero does not."""
    for cell in cells:
        if cell.node is None or torch.Tag.nondeterministic_seeded not in getattr(cell.target, "tags", ()):
            continue
        given: Mapping[str, Any] = arguments(cell.node)
        chances = [given[name] for name in ("p", "dropout_p") if name in given]
        if (chances and chances[0] == 0) or given.get("train") is False:
            continue
        return cell
    return None
