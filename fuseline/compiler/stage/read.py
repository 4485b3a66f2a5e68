"""A stage's file, read back into a program: its Python is parsed, never run, so a stranger's file is safe to open."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .. import compat
from ..errors import UserError
from ..expressions import Expression, Param
from ..normalize import functionalize, mark_autocast
from ..program import Program, Source
from ..rewriter import fake_call, fake_weight
from .render import FORMAT
from .statements import Method, Reader
from .tensors import examples, placed


def is_stage(path: str | Path) -> bool:
    """Whether a file looks like a stage, whatever it was edited to."""
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return "class Stage" in text and "\nSTAGE = {" in text


def load_stage(path: str | Path) -> Program:
    """The program of a dumped stage or a reproducer, edits included; types are worked out anew.

    Raises:
        UserError: naming the line that is no call of an op, or whose types do not fit.
    """
    path = Path(path)
    tables, methods = _parse(path)
    stage = tables["STAGE"]
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbols = compat.new_symbols(mode, stage["symbols"])
    flat = examples(stage["tensors"], path.parent)
    if flat is not None:
        flat = placed(flat, [*stage["inputs"].values(), *tables["PARAMETERS"].values()])
    program = Program(
        GraphModule(torch.nn.Module(), Graph()),
        mode,
        [entry["index"] for entry in stage["inputs"].values()],
        {name: _source(name, entry, flat, mode) for name, entry in tables["PARAMETERS"].items()},
        frozenset(name for name, entry in stage["inputs"].items() if entry.get("written")),
        stage["training"],
        flat,
        frozenset(stage["state"]),
    )
    _Loader(path, program, tables, methods, symbols).forward()
    functionalize(program.graph)
    mark_autocast(program.graph)
    program.graph.lint()
    program.module.recompile()
    return program


def read_table(path: str | Path) -> dict[str, Any]:
    """The table `STAGE` of a stage's file, notes included (a reproducer's pipeline and check)."""
    return _parse(Path(path))[0]["STAGE"]


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, ast.FunctionDef]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"{path}{f':{line}' if line else ''} is not Python: {error}") from None
    tables: dict[str, Any] = {}
    methods: dict[str, ast.FunctionDef] = {}
    for item in tree.body:
        if isinstance(item, ast.ClassDef) and item.name == "Stage":
            methods = {m.name: m for m in item.body if isinstance(m, ast.FunctionDef)}
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            try:
                tables[item.targets[0].id] = ast.literal_eval(item.value)
            except ValueError:
                raise UserError(
                    f"{path}:{item.lineno}: the table {item.targets[0].id} holds more than literals"
                ) from None
    missing = [name for name in ("STAGE", "WEIGHTS", "PARAMETERS", "ORIGINS") if name not in tables]
    if missing or "forward" not in methods:
        raise UserError(
            f"{path} is not a dumped stage: it has no {missing[0] if missing else 'Stage.forward'}",
            remedy="fuseline opt MODEL -p PIPELINE --dump DIR    writes stages",
        )
    found = tables["STAGE"].get("format")
    if found != FORMAT:
        raise UserError(f"{path} is a stage of format {found}, and this version reads format {FORMAT}")
    return tables, methods


class _Infinite(ast.NodeTransformer):
    """`inf` and `nan`, which Python has no literals for."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant({"inf": math.inf, "nan": math.nan}[node.id]) if node.id in ("inf", "nan") else node


def _source(name: str, entry: dict[str, Any], flat: list[Any] | None, mode: FakeTensorMode) -> Source:
    if flat is not None:
        tensor = flat[entry["index"]]
    else:
        dtype, sizes = _split_type(entry["type"])
        shape = ast.literal_eval(f"[{sizes}]")
        with mode:
            tensor = torch.empty(shape, dtype=dtype, device=entry.get("device", "cpu"))
    trainable = entry.get("trainable", False)
    if trainable and flat is not None:
        tensor = flat[entry["index"]] = torch.nn.Parameter(tensor)
    return Source(name, entry["index"], tensor, trainable, entry.get("constant", False))


def _split_type(text: str) -> tuple[torch.dtype, str]:
    name, _, sizes = text.removesuffix("]").partition("[")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"'{text}' is not a tensor's type", remedy='"float32[1, s0, 64]"')
    return dtype, sizes


class _Loader:
    """Builds the graph of one stage."""

    def __init__(
        self,
        path: Path,
        program: Program,
        tables: dict[str, Any],
        methods: dict[str, ast.FunctionDef],
        symbols: dict[str, Any],
    ):
        self.path, self.program, self.tables, self.methods, self.symbols = path, program, tables, methods, symbols
        self.reader = Reader(path, self)
        self.origins = tables["ORIGINS"]
        self.types: dict[Any, Any] = {}

    def forward(self) -> None:
        """Fills the program's own graph."""
        method = Method(self.path, self.methods["forward"])
        inputs, weights = self.tables["STAGE"]["inputs"], self.tables["WEIGHTS"]
        unknown = [n for n in method.arguments if n not in inputs and n not in weights]
        missing = [n for n in (*inputs, *weights) if n not in method.arguments]
        if unknown or missing:
            fault = (
                f"takes '{unknown[0]}', which is no input and no weight" if unknown else f"leaves out '{missing[0]}'"
            )
            raise UserError(
                f"{self.path}:{method.line}: forward {fault}", remedy="add it to the tables below, or restore it"
            )
        module, graph = self.program.module, self.program.graph
        names: dict[str, Node] = {}
        for name in inputs:
            names[name] = graph.placeholder(name)
            names[name].meta["val"] = self._input(name, inputs[name])
            self.origin(names[name], name)
        for name, record in weights.items():
            expression = Param(record) if isinstance(record, str) else Expression.from_json(record)
            for parameter in expression.parameters():
                if parameter not in self.program.sources:
                    raise UserError(f"{self.path}: the weight '{name}' needs '{parameter}', which PARAMETERS lacks")
            value = fake_weight(self.program, expression, self.types)
            module.register_buffer(name, value, persistent=False)
            names[name] = graph.get_attr(name)
            names[name].meta.update(val=value, weight=expression)
            self.origin(names[name], name)
        self.reader.body(method, graph, names, "")

    def region(self, target: str, arguments: list[Node]) -> GraphModule:
        """The region that the method `target` stands for, called on these nodes."""
        method = Method(self.path, self.methods[target])
        graph = Graph()
        names: dict[str, Node] = {}
        for name, given in zip(method.arguments, arguments, strict=True):
            names[name] = graph.placeholder(name)
            names[name].meta["val"] = given.meta["val"]
            if "weight" in given.meta:
                names[name].meta["is_weight"] = True
            if given.meta.get("written"):
                names[name].meta["written"] = True
            self.origin(names[name], f"{target}.{name}")
        self.reader.body(method, graph, names, f"{target}.")
        kind = self.tables["STAGE"]["regions"].get(target, target)
        module = GraphModule(torch.nn.Module(), graph, class_name=kind.title().replace("_", ""))
        module.meta["kind"] = kind
        return module

    def value(self, node: Node) -> Any:
        """The fake result of a call."""
        return fake_call(self.program, node.target, node.args, node.kwargs, node.meta.get("autocast", ()))  # type: ignore[arg-type]

    def origin(self, node: Node, name: str) -> None:
        """Gives a node the provenance that the tables record under its name."""
        row = self.origins["nodes"].get(name)
        if row is None:
            return
        module, lines, makers = row
        here, *others = (self.origins["lines"][i] for i in lines)
        if here:
            file, _, line = here.rpartition(":")
            node.meta["stack_trace"] = f'  File "{file}", line {line}, in forward\n'
        path = self.origins["modules"][module]
        if path:
            node.meta["nn_module_stack"] = {path: (path, "")}
        chain = tuple(self.origins["makers"][makers])
        if chain or others:
            node.meta["custom"] = {"fuseline": chain, "fuseline_lines": tuple(others)}

    def _input(self, name: str, entry: dict[str, Any]) -> Any:
        if "value" in entry:
            return entry["value"]
        text = entry["type"]
        if text.startswith("Sym"):
            return self.reader.number(text.partition("(")[2].removesuffix(")"), self.symbols)
        dtype, sizes = _split_type(text)
        shape = [self.reader.number(size, self.symbols) for size in _commas(sizes)]
        strides = [self.reader.number(s, self.symbols) for s in entry["strides"]] if "strides" in entry else None
        with compat.on_fake_values(self.program.fake_mode):
            device = entry.get("device", "cpu")
            if strides is None:
                value = torch.empty(shape, dtype=dtype, device=device)
            else:
                value = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        return value.requires_grad_(entry.get("requires_grad", False)) if dtype.is_floating_point else value


def _commas(text: str) -> list[str]:
    """The sizes in a type's text, split at commas outside parentheses."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]
