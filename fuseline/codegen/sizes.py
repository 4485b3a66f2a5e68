"""Sizes of tensors as numbers or formulas, and their text on the host.

A size is an int, or a sympy expression in the program's size symbols. Nothing symbolic is baked into a kernel: the
host function reads each symbol from the shapes of the tensors it was really given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch

from .call import Unsupported

Size = Any  # int | sympy.Expr


def size(value: int | torch.SymInt) -> Size:
    """The size behind an int or a SymInt."""
    if isinstance(value, torch.SymInt):
        expression = _without_exact_divisions(value.node.expr)
        return int(expression) if expression.is_Integer else expression
    return int(value)


def _without_exact_divisions(expression: sympy.Expr) -> sympy.Expr:
    """(s·t) // s → t, as a view with an inferred size leaves behind: without it equal shapes look different."""
    divisions = {a for a in sympy.preorder_traversal(expression) if type(a).__name__ in ("FloorDiv", "CleanDiv")}
    for division in sorted(divisions, key=lambda a: a.count_ops()):
        quotient = sympy.cancel(division.args[0] / division.args[1])
        if quotient.is_Integer or quotient.is_polynomial() and all(c.is_Integer for c in sympy.Poly(quotient).coeffs()):
            expression = expression.xreplace({division: quotient})
    return expression


def shape(node: torch.fx.Node) -> tuple[Size, ...]:
    """The shape of a tensor node."""
    return tuple(size(s) for s in node.meta["val"].shape)


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for s in sizes:
        result = result * s
    return result


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal whatever the symbols' values."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b or sympy.expand(a - b) == 0)


class SizeReader:
    """Writes sizes as Python on the host, from the region's arguments.

    A placeholder's dimension whose size is the symbol itself, or the very formula asked for, is read from
    `name.shape[k]`; a SymInt placeholder is an int argument.
    """

    def __init__(self, placeholders: Sequence[torch.fx.Node], names: Sequence[str]):
        self.known: dict[Size, str] = {}
        for node, name in zip(placeholders, names, strict=True):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self.known.setdefault(size(value), name)
        for node, name in zip(placeholders, names, strict=True):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                for k, s in enumerate(value.shape):
                    if not isinstance(size(s), int):
                        self.known.setdefault(size(s), f"{name}.shape[{k}]")

    def text(self, value: Size) -> str:
        """Raises Unsupported where no argument tells the size."""
        if isinstance(value, int) or value.is_Integer:
            return str(int(value))
        if value in self.known:
            return self.known[value]
        writer = _WRITERS.get(type(value).__name__)
        if writer is None or value.is_Symbol or (value.is_Pow and not value.exp.is_Integer):
            raise Unsupported(f"no input has the size {value}")
        return writer([self.text(argument) for argument in value.args])

    def product(self, sizes: Sequence[Size]) -> str:
        """The product of sizes, dimension by dimension, which reads better than its expanded formula."""
        numbers = product(s for s in sizes if isinstance(s, int))
        symbols = [self.factor(s) for s in sizes if not isinstance(s, int)]
        return " * ".join(symbols + ([str(numbers)] if numbers != 1 or not symbols else []))

    def factor(self, value: Size) -> str:
        text = self.text(value)
        return f"({text})" if any(sign in text for sign in "+-/%") and not text.endswith((")", "]")) else text


def _infix(sign: str) -> Any:
    return lambda parts: f"({f' {sign} '.join(parts)})"


_WRITERS: dict[str, Any] = {
    "Add": _infix("+"),
    "Mul": _infix("*"),
    "Pow": _infix("**"),
    "FloorDiv": _infix("//"),
    "CleanDiv": _infix("//"),
    "Mod": _infix("%"),
    "PythonMod": _infix("%"),
    "Max": lambda parts: f"max({', '.join(parts)})",
    "Min": lambda parts: f"min({', '.join(parts)})",
}
