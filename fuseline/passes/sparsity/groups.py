"""What shares a mask: the products of one input, and why some products have none."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from ...compiler import ops
from ...compiler.order import touches_written
from ...compiler.program import Program
from ...compiler.traits import is_view
from ..quantize_sites import Site, heads, sites


@dataclass(frozen=True)
class Group:
    """Products of one x: they drop the same channels, and share the low-rank branch's `down`.

    n: channels of x; m: output columns of all products together; itemsize: bytes of a weight's element.
    """

    sites: tuple[Site, ...]
    names: tuple[str, ...]

    @property
    def n(self) -> int:
        return self.sites[0].shape[1]

    @property
    def m(self) -> int:
        return sum(site.shape[0] for site in self.sites)

    @property
    def itemsize(self) -> int:
        size: int = self.sites[0].node.meta["val"].dtype.itemsize
        return size

    @property
    def name(self) -> str:
        """The first product's site."""
        return self.names[0]

    @property
    def bytes(self) -> int:
        """Of the dense weights."""
        return self.n * self.m * self.itemsize

    def spent(self, fraction: float, rank: int) -> float:
        """Bytes that are read where `fraction` of the channels is kept beside a branch of this rank."""
        return (fraction * self.n * self.m + rank * (self.n + self.m)) * self.itemsize

    @property
    def kind(self) -> str:
        """The last words of the products' paths, `q_proj+k_proj+v_proj`."""
        return "+".join(site.path.rpartition(".")[2] for site in self.sites)

    @property
    def block(self) -> str:
        """The repeated part of the model that it lies in: its path up to the first number; "" where there is none."""
        found = re.match(r"(?:[^.]*\.)*?\d+(?=\.|$)", self.sites[0].path)
        return found.group() if found else ""


def groups(
    program: Program, names: dict[Node, str], only: Sequence[str], skip: Sequence[str]
) -> tuple[list[Group], dict[Site, str]]:
    """The groups, in graph order, and the products that stay dense, with the reason.

    names: node → site. Products that `only` and `skip` leave out are in neither.
    """
    over_vocabulary = heads(program)
    by_input: dict[Node, list[Site]] = {}
    refused: dict[Site, str] = {}
    for site in sites(program):
        if left_out(site, only, skip):
            continue
        reason = _refuse(program, site, site.node in over_vocabulary and not only)
        if reason:
            refused[site] = reason
        else:
            by_input.setdefault(site.x, []).append(site)
    found = [Group(tuple(ones), tuple(names[s.node] for s in ones)) for ones in by_input.values()]
    return found, refused


def left_out(site: Site, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether the options leave a product out, without a word."""
    named = lambda patterns: any(fnmatch.fnmatchcase(site.path, pattern) for pattern in patterns)
    return named(skip) or (bool(only) and not named(only))


def _refuse(program: Program, site: Site, head: bool) -> str | None:
    value = site.node.meta["val"]
    if site.node.target is ops.sparse_linear.overload:
        return "it drops channels already"
    if site.kernel is not None:
        return "a convolution's weights are read once for all positions: dropping channels at some saves no bytes"
    if head:
        return f"the model's head over its vocabulary: name it to make it sparse, only={site.path}"
    if not value.dtype.is_floating_point:
        return f"its result is {value.dtype}, not a floating-point type"
    if site.bias is not None and site.bias.meta["val"].dim() != 1:
        return "what is added to it is no bias of one number a column"
    if touches_written(site.node):
        return "what it reads is written to in place"
    if turned := _turned(site.x):
        return (
            f"its input is rotated at run time ({turned}), which spreads each channel over all of them: none is small "
            "enough to drop. Rotate what folds into weights alone, or leave the product out with skip"
        )
    if program.training and any(program.sources[n].trainable for n in site.weight.parameters()):
        return "its weight wants a gradient: compile under torch.no_grad(), or freeze it"
    return None


def _turned(x: Node) -> str | None:
    """The op that rotates x at run time, seen through views, casts and roundings."""
    node = x
    while node.op == "call_function":
        if node.target is ops.hadamard.overload:
            return "fuseline.hadamard"
        table = node.args[1] if len(node.args) > 1 else None
        weight = table.meta.get("weight") if isinstance(table, Node) else None
        if weight is not None and not weight.parameters() and table.meta["val"].dim() == 2:  # type: ignore[union-attr]
            return "a product with a rotation"
        op = ops.find(node.target)
        rounding = op is not None and op.name in ("dequantize", "decode", "quantize", "quantize_affine", "encode")
        casts = getattr(node.target, "_opname", "") in ("to", "_to_copy", "getitem")
        if not (rounding or casts or is_view(node.target)) or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    return None
