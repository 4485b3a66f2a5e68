"""What a linear region is made of: the input, an optional norm, the linears, and the sections of their epilogues.

    x ── [norm] ── h ─┬─ linear ── epilogue ── output      a section: linears whose results meet in an epilogue
                      └─ linear ── output                  another section: other columns of the same launch

Sections share the input and nothing else. Each program of a kernel serves a block of columns of one section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...compiler import products
from ...compiler.ops import decode_words, find
from ...compiler.traits import arguments
from ..dtypes import is_supported
from ..kernel import Refusal
from .coded.weight import Coded
from .naming import canonical_names
from .weights import Weight

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten._to_copy.default, torch.ops.prims.convert_element_type.default)
COMPUTED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Norm:
    """The normalisation before the linears. `rms`: without a mean; `offset` is added to the weight (1 + w)."""

    rms: bool
    weight: Node | None
    bias: Node | None
    eps: float
    offset: float
    node: Node


@dataclass(frozen=True)
class Linear:
    """One matrix product: `node` computes h·Wᵀ + bias, with n columns."""

    node: Node
    weight: Weight | Coded
    bias: Node | None
    n: int

    @property
    def plain(self) -> Weight:
        """The weight, where it is floats or bytes of codes."""
        assert isinstance(self.weight, Weight)
        return self.weight

    @property
    def coded(self) -> Coded:
        """The weight, where it is codes in the layout of their own template."""
        assert isinstance(self.weight, Coded)
        return self.weight


@dataclass(frozen=True)
class Activation:
    """Codes of the run that are multiplied as they are: int8 or e4m3, with one scale a row."""

    codes: Node
    scale: Node
    dtype: torch.dtype


@dataclass(frozen=True)
class Section:
    """Linears whose results meet, the pointwise nodes after them in graph order, and what the region returns."""

    linears: tuple[Linear, ...]
    pointwise: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def n(self) -> int:
        return self.linears[0].n


@dataclass(frozen=True)
class Anchor:
    """A region that the template can serve. `dtype` is the type of h, in which the product is taken."""

    x: Node
    k: int
    dtype: torch.dtype
    norm: Norm | None
    sections: tuple[Section, ...]
    placeholders: tuple[Node, ...]
    outputs: tuple[Node, ...]
    returns_tuple: bool
    names: dict[Node, str]  # of every node that a kernel mentions
    activation: Activation | None = None  # x is its codes

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for section in self.sections for linear in section.linears)

    @property
    def columns_of_all(self) -> int:
        """Output columns of all linears, those that meet in a section counted apart."""
        return sum(linear.n for linear in self.linears)

    @property
    def columns(self) -> int:
        """Output columns of all sections together."""
        return sum(section.n for section in self.sections)


@dataclass(frozen=True)
class Reader:
    """How a template's products are read: their op, and a function of a node and the number of inputs."""

    target: Any
    linear: Callable[[Node, int], Linear]


class Refused(Exception):
    """Why a region is not one for this template; the text is the reason."""


def analyse(
    region: GraphModule, read: Reader | None = None, extra: Mapping[Node, str] | None = None
) -> Anchor | Refusal:
    """Reads a region's graph; a Refusal says what the template cannot do with it.

    read: what reads the region's products, `aten.linear` where absent; extra: further placeholders that the kernels
    mention, and their names.
    """
    try:
        return _analyse(region, read, extra or {})
    except Refused as refused:
        return Refusal(str(refused))


def _analyse(region: GraphModule, read: Reader | None, extra: Mapping[Node, str]) -> Anchor:
    nodes, target = list(region.graph.nodes), aten.linear.default if read is None else read.target
    calls = [n for n in nodes if n.op == "call_function" and n.target is target]
    if not calls:
        raise Refused(f"the region has no {str(target).removesuffix('.default')}")
    inputs = list(dict.fromkeys(n.args[0] for n in calls))
    if len(inputs) > 1:
        raise Refused(f"the linears read {len(inputs)} different inputs: {', '.join(map(str, inputs))}")
    h = inputs[0]
    activation, norm = _activation(h), None
    if activation is None:
        x, norm, prologue = _prologue(h)
    else:
        x, prologue = activation.codes, activation_nodes(h)
    dtype = value(h).dtype
    for what, checked in (("the input", value(x).dtype), ("the product", dtype)):
        if checked not in COMPUTED and (activation is None or what == "the product"):
            raise Refused(f"{_short(checked)} {what.split()[-1]}: kernels compute in float32, float16 and bfloat16")
    if value(x).dim() < 1:
        raise Refused("the input has no dimensions")
    k = _static(value(x).shape[-1], "the input's last dimension")
    if k == 0:
        raise Refused("the input's last dimension is 0")

    integers = activation is not None and activation.dtype == torch.int8
    linears = {n: read.linear(n, k) if read is not None else _linear(n, k, integers) for n in calls}
    weight_nodes = {n for linear in linears.values() for n in linear.weight.nodes}
    inner = [n for n in nodes if n.op == "call_function" and n not in linears and n not in weight_nodes | prologue]
    output = next(n for n in nodes if n.op == "output")
    returned = output.args[0]
    outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    for n in inner:
        if not isinstance(value(n), torch.Tensor):
            raise Refused(f"{n.name} ({n.target}) is not a tensor")
        for operand in n.all_input_nodes:
            if operand in prologue | weight_nodes and operand.op != "placeholder":
                raise Refused(f"{n.name} reads {operand.name}, which is computed inside the product")
    for n in outputs:
        if n not in linears and n not in inner:
            raise Refused(f"{n} is returned, but it is not computed from a linear")
        if not is_supported(value(n).dtype):
            raise Refused(f"the output {n.name} has dtype {_short(value(n).dtype)}")
    sections = _sections(linears, inner, outputs)
    for section in sections:
        for n in section.outputs:
            if not same_shape(value(n).shape, (*value(x).shape[:-1], section.n)):
                raise Refused(f"the output {n.name} has shape {_shape(n)}, not the input's rows by {section.n}")
            if not _is_contiguous(value(n)):
                raise Refused(f"the output {n.name} is not contiguous in the graph")
    placeholders = tuple(n for n in nodes if n.op == "placeholder")
    devices = {value(n).device for n in placeholders if isinstance(value(n), torch.Tensor)}
    if len(devices) > 1:
        raise Refused(f"its inputs lie on several devices: {', '.join(sorted(map(str, devices)))}")
    names = canonical_names(x, norm, sections, placeholders, extra, activation and activation.scale)
    tupled = isinstance(returned, (tuple, list))
    if activation is not None and not all(isinstance(linear.weight, Coded) for linear in linears.values()):
        raise Refused("activations are codes, and the weights are not in the layout of their kernel")
    return Anchor(x, k, dtype, norm, sections, placeholders, outputs, tupled, names, activation)


def _activation(h: Node) -> Activation | None:
    """The codes behind the linears' input, where it is what they stand for."""
    node, _ = through_casts(h)
    found = products.activation(node) if node.op == "call_function" else None
    if found is None or any(n.op != "placeholder" for n in found):
        return None
    codes, scale = found
    return Activation(codes, scale, value(codes).dtype)


def activation_nodes(h: Node) -> set[Node]:
    """The decoding of activations and the casts after it."""
    node, inside = through_casts(h)
    return inside | {node}


def _prologue(h: Node) -> tuple[Node, Norm | None, set[Node]]:
    """The placeholder behind the linears' input, the norm between them, and the nodes on the way."""
    node, inside = through_casts(h)
    norm = None
    if node.op == "call_function":
        norm = _norm(node)
        node, casts = through_casts(node.args[0])
        inside |= {norm.node} | casts
    if node.op != "placeholder":
        raise Refused(f"the input goes through {node.target} before the linear; only one norm can stand there")
    return node, norm, inside


def _norm(node: Node) -> Norm:
    op = find(node.target)
    if op is None or op.name not in ("rms_norm", "layer_norm"):
        raise Refused(f"the input goes through {node.target} before the linear; only one norm can stand there")
    given = arguments(node)
    if given.get("accumulate") is torch.float64:
        raise Refused("float64 statistics of the norm")
    weight, bias = given["weight"], given.get("bias")
    for n in (weight, bias):
        if n is not None and n.op != "placeholder":
            raise Refused(f"the norm's parameter {n.name} is computed in the region")
    offset = 1.0 if given.get("unit_offset") else 0.0
    return Norm(op.name == "rms_norm", weight, bias, given["eps"], offset, node)


def _linear(node: Node, k: int, integers: bool) -> Linear:
    source, inside = through_casts(node.args[1])
    bias = arguments(node)["bias"]
    if bias is not None and bias.op != "placeholder":
        raise Refused(f"the bias of {node.name} is computed in the region")
    shape = value(node.args[1]).shape
    if len(shape) != 2:
        raise Refused(f"the weight of {node.name} has {len(shape)} dimensions")
    n = _static(shape[0], f"the number of rows of {node.name}'s weight")
    _static(shape[1], f"the number of columns of {node.name}'s weight")
    if source.op == "placeholder":
        if value(source).dtype not in COMPUTED:
            raise Refused(f"the weight of {node.name} is {_short(value(source).dtype)}")
        return Linear(node, Weight(source, k, frozenset(inside)), bias, n)
    if source.target is decode_words.overload:
        return Linear(node, _coded(source, k, frozenset(inside | {source}), integers), bias, n)
    return Linear(node, coded(node, source, inside, k, "inputs"), bias, n)


def coded(node: Node, source: Node, inside: set[Node], length: int, along: str) -> Weight:
    """A weight that is dequantized in the region. length: values in a stored row, which lie `along` inputs or outputs;
    inside: what else the kernel replaces."""
    op = find(source.target)
    if op is not None and op.name == "decode":
        raise Refused(f"{source.args[4]} codes of {node.name}'s weight: {products.refuse_words(source) or 'unpacked'}")
    if op is None or op.name != "dequantize":
        raise Refused(f"the weight of {node.name} is computed by {source.target}")
    codes, scale, zero, bits, group, _ = arguments(source).values()
    for name, operand in (("codes", codes), ("scale", scale), ("zero point", zero)):
        if operand is not None and operand.op != "placeholder":
            raise Refused(f"the {name} of {node.name}'s weight are computed in the region")
    if bits not in (4, 8):
        raise Refused(f"{bits}-bit codes of {node.name}")
    if length % group or (bits == 4 and group % 2):
        raise Refused(
            f"groups of {group} over {length} {along} of {node.name}: the group is even and divides the {along}"
        )
    if value(scale).dtype not in COMPUTED:
        raise Refused(f"the scale of {node.name}'s weight is {_short(value(scale).dtype)}")
    return Weight(
        codes, length, frozenset(inside | {source}), bits, group, scale, zero, signed=value(codes).dtype is torch.int8
    )


def _coded(node: Node, k: int, inside: frozenset[Node], integers: bool) -> Coded:
    given = arguments(node)
    for operand in (given["codes"], given["scale"], given["zero"], given["outer"]):
        if operand is not None and operand.op != "placeholder":
            raise Refused(f"{operand.name} of the weight {node.name} is computed in the region")
    return Coded(
        given["codes"], k, inside, given["format"], given["group"], given["run"], given["scale"], given["zero"],
        given["outer"], apart=integers,
    )  # fmt: skip


def _sections(linears: dict[Node, Linear], inner: list[Node], outputs: tuple[Node, ...]) -> tuple[Section, ...]:
    """Linears that an output needs together are one section; the order is that of their first linear."""
    behind: dict[Node, set[Node]] = {n: {n} for n in linears}
    for n in inner:
        behind[n] = {n}.union(*(behind.get(operand, set()) for operand in n.all_input_nodes))
    groups: list[set[Node]] = []
    for n in outputs:
        merged = set(behind[n])
        apart = []
        for other in groups:
            if other & merged & set(linears):
                merged |= other
            else:
                apart.append(other)
        groups = [*apart, merged]
    order = list(linears)
    groups.sort(key=lambda g: min((order.index(n) for n in g if n in linears), default=len(order)))
    sections = []
    for group in groups:
        members = tuple(linear for n, linear in linears.items() if n in group)
        if not members:
            raise Refused("an output does not depend on any linear")
        if len({m.n for m in members}) > 1:
            raise Refused(f"linears of {sorted({m.n for m in members})} columns meet in one epilogue")
        results = tuple(dict.fromkeys(n for n in outputs if n in group))
        sections.append(Section(members, tuple(n for n in inner if n in group), results))
    return tuple(sections)


def through_casts(node: Any) -> tuple[Node, set[Node]]:
    """The node behind changes of dtype, and those changes: kernels compute in float32 whatever stood between."""
    inside: set[Node] = set()
    while isinstance(node, Node) and node.op == "call_function" and node.target in CASTS:
        if value(node).device != value(node.args[0]).device:
            break
        inside.add(node)
        node = node.args[0]
    return node, inside


def value(node: Node) -> Any:
    """The fake value of a node."""
    return node.meta["val"]


def same_shape(a: Any, b: Any) -> bool:
    """Equal for every value of the symbolic sizes."""
    return len(a) == len(b) and all(statically_known_true(i == j) for i, j in zip(a, b))


def _is_contiguous(tensor: torch.Tensor) -> bool:
    """Row-major for every value of the symbolic sizes."""
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
        if not statically_known_true(size == 1):
            if not statically_known_true(stride == expected):
                return False
            expected = expected * size
    return True


def _static(size: Any, what: str) -> int:
    if not isinstance(size, int):
        raise Refused(f"{what} is symbolic ({size})")
    return size


def _shape(node: Node) -> str:
    return "[" + ", ".join(map(str, value(node).shape)) + "]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
