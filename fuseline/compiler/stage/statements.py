"""The statements that a stage may hold: assignments of calls of ops, one node each, nested where a person likes it."""

from __future__ import annotations

import ast
import builtins
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from ..errors import FuselineError, UserError, nearest

aten = torch.ops.aten
_ROOTS = {"torch": torch, "operator": operator, "math": math}
_TENSOR_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: aten.add, ast.Sub: aten.sub, ast.Mult: aten.mul, ast.Div: aten.div, ast.Pow: aten.pow,
    ast.MatMult: aten.matmul,
}  # fmt: skip
_NUMBER_OPERATORS: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_DEBUGGING = {"print", "breakpoint"}


class Owner(Protocol):
    """What the reader asks of the stage around it."""

    methods: dict[str, ast.FunctionDef]

    def region(self, target: str, arguments: list[Node]) -> GraphModule: ...

    def value(self, node: Node) -> Any: ...

    def origin(self, node: Node, name: str) -> None: ...


class Method:
    """One method of a stage: its arguments and statements."""

    def __init__(self, path: Path, definition: ast.FunctionDef):
        spec = definition.args
        self.arguments = [a.arg for a in spec.args[1:]]
        self.line, self.statements = definition.lineno, definition.body
        if spec.vararg or spec.kwarg or spec.kwonlyargs or spec.defaults:
            raise UserError(f"{path}:{self.line}: {definition.name} takes plain arguments only")


class Reader:
    """Turns methods into graphs."""

    def __init__(self, path: Path, owner: Owner):
        self.path, self.owner = path, owner

    def body(self, method: Method, graph: Graph, names: dict[str, Node], prefix: str) -> None:
        """Adds a method's statements to a graph; `names` are the values known so far, by the names in the file."""
        values: dict[str, Any] = dict(names)
        for statement in method.statements:
            if isinstance(statement, ast.Return):
                result = self._expression(statement.value, values, graph, prefix) if statement.value else None
                graph.output(result).meta["val"] = torch.fx.node.map_arg(result, lambda n: n.meta["val"])
                return
            if isinstance(statement, ast.Expr) and _is_debugging(statement.value):
                continue
            if isinstance(statement, ast.Expr):
                self._expression(statement.value, values, graph, prefix)
            elif isinstance(statement, ast.Assign) and all(isinstance(t, ast.Name) for t in statement.targets):
                value = self._expression(statement.value, values, graph, prefix, statement.targets[0].id)  # type: ignore[attr-defined]
                for target in statement.targets:
                    values[target.id] = value  # type: ignore[attr-defined]
            elif not isinstance(statement, ast.Pass):
                self._fail(statement, "a stage holds assignments of calls and a return", "name = torch.ops.aten.…(…)")
        self._fail(method.statements[-1], "the method returns nothing", "return (…,)")

    def number(self, text: str, symbols: dict[str, Any]) -> Any:
        """A size, `2*s0 + 1`, over known symbols."""
        try:
            return self._size(ast.parse(text.strip(), mode="eval").body, symbols)
        except SyntaxError:
            raise UserError(f"{self.path}: '{text}' is not a size") from None

    def _size(self, node: ast.expr, symbols: dict[str, Any]) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.Name) and node.id in symbols:
            return symbols[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._size(node.operand, symbols)
        if isinstance(node, ast.BinOp) and type(node.op) in _NUMBER_OPERATORS:
            left, right = self._size(node.left, symbols), self._size(node.right, symbols)
            return _NUMBER_OPERATORS[type(node.op)](left, right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = [self._size(a, symbols) for a in node.args]
            functions = {
                "Mod": operator.mod, "PythonMod": operator.mod, "FloorDiv": operator.floordiv,
                "Max": torch.sym_max, "Min": torch.sym_min,
            }  # fmt: skip
            if node.func.id in functions:
                return functions[node.func.id](*arguments)
        known = nearest(node.id, symbols) if isinstance(node, ast.Name) else ""
        raise UserError(f"{self.path}: the size '{ast.unparse(node)}' is not known{known}")

    def _expression(
        self, node: ast.expr, values: dict[str, Any], graph: Graph, prefix: str, name: str | None = None
    ) -> Any:
        inner = lambda n: self._expression(n, values, graph, prefix)
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id in values:
                return values[node.id]
            if node.id in _ROOTS:
                return _ROOTS[node.id]
            self._fail(node, f"'{node.id}' is not defined here{_close(node.id, values)}")
        if isinstance(node, ast.Tuple):
            return tuple(map(inner, node.elts))
        if isinstance(node, ast.List):
            return list(map(inner, node.elts))
        if isinstance(node, ast.Dict):
            return {inner(k): inner(v) for k, v in zip(node.keys, node.values) if k is not None}
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = inner(node.operand)
            if not isinstance(value, Node):
                return -value
            return self._call(node, aten.neg.default, (value,), {}, graph, prefix, name)
        if isinstance(node, ast.BinOp):
            return self._operator(node, inner(node.left), inner(node.right), graph, prefix, name)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, inner(node.value))
        if isinstance(node, ast.Subscript):
            index = inner(node.slice)
            return self._call(node, operator.getitem, (inner(node.value), index), {}, graph, prefix, name)
        if isinstance(node, ast.Slice):
            return slice(*(inner(part) if part is not None else None for part in (node.lower, node.upper, node.step)))
        if isinstance(node, ast.Call):
            args = tuple(map(inner, node.args))
            kwargs = {k.arg: inner(k.value) for k in node.keywords if k.arg is not None}
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                if node.func.value.id == "self":
                    return self._region(node, node.func.attr, args, graph, prefix, name)
            if isinstance(node.func, ast.Name) and node.func.id == "slice":
                return slice(*args)
            return self._call(node, inner(node.func), args, kwargs, graph, prefix, name)
        self._fail(node, f"'{ast.unparse(node)[:60]}' is not a call of an op")

    def _operator(self, node: ast.BinOp, left: Any, right: Any, graph: Graph, prefix: str, name: str | None) -> Any:
        is_tensor = lambda v: isinstance(v, Node) and isinstance(v.meta.get("val"), torch.Tensor)
        kind = type(node.op)
        if is_tensor(left) or is_tensor(right):
            packet = _TENSOR_OPERATORS.get(kind)
            if not is_tensor(left) and kind in (ast.Add, ast.Mult):
                left, right = right, left
            if packet is None or not is_tensor(left):
                self._fail(node, "this operator is not defined for these operands", "write the op: torch.ops.aten.…")
            default = {ast.Pow: "Tensor_Tensor" if is_tensor(right) else "Tensor_Scalar", ast.MatMult: "default"}
            return self._call(
                node, getattr(packet, default.get(kind, "Tensor")), (left, right), {}, graph, prefix, name
            )
        if kind not in _NUMBER_OPERATORS:
            self._fail(node, "this operator is not defined for numbers")
        if not isinstance(left, Node) and not isinstance(right, Node):
            return _NUMBER_OPERATORS[kind](left, right)
        return self._call(node, _NUMBER_OPERATORS[kind], (left, right), {}, graph, prefix, name)

    def _attribute(self, node: ast.Attribute, owner: Any) -> Any:
        if isinstance(owner, Node):
            self._fail(node, f"a stage calls ops, not methods or attributes of values ('.{node.attr}')")
        try:
            return getattr(owner, node.attr)
        except AttributeError:
            text = ast.unparse(node)
            packet = dir(owner) if owner is not torch else ()
            self._fail(node, f"there is no {text}{_close(node.attr, packet)}")

    def _region(
        self, node: ast.Call, target: str, args: tuple[Any, ...], graph: Graph, prefix: str, name: str | None
    ) -> Node:
        if target not in self.owner.methods:
            self._fail(node, f"Stage has no method '{target}'{_close(target, self.owner.methods)}")
        if prefix:
            self._fail(node, "a region calls no other region")
        owner = graph.owning_module
        if not hasattr(owner, target):
            assert owner is not None
            owner.add_submodule(target, self.owner.region(target, list(args)))
        elif not isinstance(getattr(owner, target), GraphModule):
            self._fail(node, f"the method '{target}' has the name of a weight: call it something else")
        created = graph.create_node("call_module", target, args, {}, name=name)
        inner = getattr(owner, target)
        result = inner.graph.output_node().meta["val"]
        created.meta["val"] = result
        self.owner.origin(created, prefix + (name or created.name))
        return created

    def _call(
        self,
        node: ast.expr,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        graph: Graph,
        prefix: str,
        name: str | None,
    ) -> Any:
        if target is torch.device:
            return torch.device(*args)
        if isinstance(target, torch._ops.OpOverloadPacket):
            overloads = [o for o in target.overloads() if "out" not in o]
            if len(overloads) > 1:
                wanted = f"{ast.unparse(node.func) if isinstance(node, ast.Call) else target}."  # type: ignore[attr-defined]
                self._fail(node, "name the overload", " or ".join(wanted + o for o in overloads[:6]))
            target = getattr(target, overloads[0])
        if not isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)) and not _is_plain(target):
            text = ast.unparse(node.func) if isinstance(node, ast.Call) else str(target)
            op = getattr(aten, text.rpartition(".")[2], None)
            remedy = f"torch.ops.{op}.{op.overloads()[0]}" if op is not None else "torch.ops.aten.…"
            self._fail(node, f"'{text}' is not an op of a stage", remedy)
        created = graph.create_node("call_function", target, args, kwargs, name=name)
        self.owner.origin(created, prefix + (name or created.name))
        try:
            created.meta["val"] = self.owner.value(created)
        except FuselineError:
            raise
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()][:3]
            raise UserError(
                f"{self.path}:{node.lineno}: {ast.unparse(node)[:80]} does not fit its arguments",
                [f"{type(error).__name__}: {lines[0] if lines else ''}", *lines[1:], *_types(args)],
            ) from error
        return created

    def _fail(self, node: ast.AST, problem: str, remedy: str | None = None) -> Any:
        raise UserError(f"{self.path}:{getattr(node, 'lineno', '?')}: {problem}", remedy=remedy)


def _is_plain(target: Any) -> bool:
    """A function that graphs call on numbers and tuples: of `operator`, `math` or `torch.sym_…`."""
    module = getattr(target, "__module__", "")
    name = getattr(target, "__name__", "")
    is_number = module in ("_operator", "operator", "math", "builtins") and getattr(builtins, name, None) is not target
    return is_number or (module == "torch" and name.startswith("sym_")) or module == "torch.amp.autocast_mode"


def _is_debugging(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _DEBUGGING


def _close(name: str, valid: Any) -> str:
    import difflib

    found = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean '{found[0]}'?" if found else ""


def _types(args: Any) -> list[str]:
    from ..structure import describe_value

    found: list[str] = []
    torch.fx.node.map_arg(args, lambda n: found.append(f"{n.name}: {describe_value(n.meta.get('val'))}"))
    return found[:4]
