"""What follows the product inside the kernel: bias, the section's pointwise nodes, and the stores.

The product is float32 and is not rounded to the linear's dtype before the epilogue; a 16-bit value rounds where the
graph casts it and where it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from ..dtypes import cast, compute_dtype, is_supported
from ..expressions import emit
from ..kernel import Refusal
from .anchor import Anchor, Linear, Refused, Section, same_shape, value
from .naming import loaded_name
from .text import Text, joined, load


def layout(node: Node, anchor: Anchor, n: int) -> str:
    """How a placeholder's elements meet an [rows, n] result: "full", "columns", "rows" or "scalar".

    Raises Refused for any other shape.
    """
    tensor = value(node)
    shape, leading = getattr(tensor, "shape", None), tuple(value(anchor.x).shape[:-1])
    if shape is None:
        raise Refused(f"{node.name} is not a tensor")
    if all(isinstance(size, int) and size == 1 for size in shape):
        return "scalar"
    if same_shape(shape[-1:], (n,)) and all(isinstance(size, int) and size == 1 for size in shape[:-1]):
        return "columns"
    if same_shape(shape, (*leading, n)):
        return "full"
    if same_shape(shape, (*leading, 1)):
        return "rows"
    raise Refused(f"{node.name}, [{', '.join(map(str, shape))}], does not lie over the input's rows by {n} columns")


def check_operands(anchor: Anchor) -> None:
    """Raises Refused for a placeholder that an epilogue cannot read."""
    for section in anchor.sections:
        for node in (*section.pointwise, *(linear.bias for linear in section.linears if linear.bias is not None)):
            for operand in [node] if node.op == "placeholder" else node.all_input_nodes:
                if operand.op == "placeholder":
                    layout(operand, anchor, section.n)
                    if not is_supported(value(operand).dtype):
                        raise Refused(f"{operand.name} is {value(operand).dtype}, which kernels do not hold")


class Epilogue:
    """Writes one section's epilogue.

    columns, rows: the kernel's index variables, and `inside`/`inside_rows` their masks (None: all are inside). In a
    tile, rows lie along the first dimension and columns along the second; otherwise there is one row.
    """

    def __init__(
        self, anchor: Anchor, section: Section, *, columns: str, rows: str, inside: str | None, tile: bool, tag: str
    ) -> None:
        self.anchor, self.section, self.names, self.tag = anchor, section, anchor.names, tag
        self.n = f"{columns}[None, :]" if tile else columns
        self.row = f"{rows}[:, None]" if tile else rows
        self.inside_n = inside and (f"{inside}[None, :]" if tile else inside)
        self.inside_m = "inside_m" if tile else None

    def write(self, text: Text, products: Mapping[Linear, str]) -> None:
        """`products`: the expression of h·Wᵀ for each linear, in float32."""
        values: dict[Node, str] = {}
        for linear in self.section.linears:
            name = values[linear.node] = f"{self.names[linear.node]}{self.tag}"
            product = products[linear]
            if linear.bias is not None:
                product += f" + {self._loaded(linear.bias)}"
            text.add(f"{name} = {product}")
        for node in self.section.pointwise:
            for operand in node.all_input_nodes:
                if operand not in values:
                    values[operand] = loaded_name(f"{self.names[operand]}{self.tag}")
                    text.add(f"{values[operand]} = {self._loaded(operand)}")
            expression = emit(node, values)
            if isinstance(expression, Refusal):
                raise Refused(expression.reason)
            values[node] = f"{self.names[node]}{self.tag}"
            text.add(f"{values[node]} = {expression}")
        for node in self.section.outputs:
            dtype = value(node).dtype
            stored = cast(values[node], compute_dtype(dtype), dtype)
            pointer = self._pointer(f"{self.names[node]}_out")
            text.add(f"tl.store({pointer}, {stored}{joined((self.inside_m, self.inside_n))})")

    def _pointer(self, pointer: str) -> str:
        return f"{pointer} + {self.row}.to(tl.int64) * {self.section.n} + {self.n}"

    def _loaded(self, node: Node) -> str:
        """A placeholder's values, shaped to meet the result, in the compute type of their dtype."""
        if node.op != "placeholder":
            raise Refused(f"{node.name} is not available in the kernel")
        kind = layout(node, self.anchor, self.section.n)
        pointer = f"{self.names[node]}_ptr"
        if kind == "scalar":
            loaded = load(pointer)
        elif kind == "columns":
            loaded = load(f"{pointer} + {self.n}", (self.inside_n,), "0")
        elif kind == "rows":
            loaded = load(f"{pointer} + {self.row}", (self.inside_m,), "0")
        else:
            loaded = load(self._pointer(pointer), (self.inside_m, self.inside_n), "0")
        return cast(loaded, value(node).dtype, compute_dtype(value(node).dtype))
