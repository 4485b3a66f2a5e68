"""The cost model: FLOPs and bytes of one call, as formulas in the program's size symbols.

An op that is unknown here, to its own `cost` rule (`compiler/ops`) and to PyTorch's table of FLOP formulas has no cost:
nothing may take it for free. `torch.utils.flop_counter.register_flop_formula` gives it one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.fx import Node

from .compat import symbolic_expression
from .compat_joint import group_size
from .machine import Machine
from .ops import find
from .traits import arguments

Size = Any
"""An int or a sympy expression in size symbols."""


@dataclass(frozen=True)
class Cost:
    """products: FLOPs of matrix products; attention: of fused attention; bytes: read and written; link: bytes that go
    to another device, `peers` of them taking part; known: whether the op has a formula; narrow: 16-bit products."""

    products: Size = 0
    attention: Size = 0
    bytes: Size = 0
    link: Size = 0
    peers: int = 1
    narrow: bool = False
    known: bool = True

    def seconds(self, machine: Machine, at: Callable[[Size], float]) -> float:
        """What the call takes on a machine; `at` turns a formula into a number."""
        if self.products == self.attention == self.bytes == self.link == 0:
            return 0.0
        peak = machine.flops_16 if self.narrow else machine.flops_32
        compute = at(self.products) / (peak * machine.product_share)
        compute += at(self.attention) / (peak * machine.attention_share)
        memory = at(self.bytes) / (machine.bandwidth * machine.bandwidth_share)
        lane = machine.lane(self.peers)
        return machine.launch + max(compute, memory) + at(self.link) / (lane * machine.bandwidth_share)


FREE = Cost()
_ATTENTION = {
    "_scaled_dot_product_flash_attention": 1.0,
    "_scaled_dot_product_efficient_attention": 1.0,
    "_scaled_dot_product_cudnn_attention": 1.0,
    "_scaled_dot_product_flash_attention_for_cpu": 1.0,
    "_scaled_dot_product_fused_attention_overrideable": 1.0,
    "_flash_attention_forward": 1.0,
    "_efficient_attention_forward": 1.0,
    "_scaled_dot_product_flash_attention_backward": 2.5,
    "_scaled_dot_product_efficient_attention_backward": 2.5,
    "_scaled_dot_product_cudnn_attention_backward": 2.5,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 2.5,
    "_scaled_dot_product_fused_attention_overrideable_backward": 2.5,
    "_flash_attention_backward": 2.5,
    "_efficient_attention_backward": 2.5,
}
_WITH_WORKSPACE = ("_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_cudnn_attention_backward")
_SENT: dict[str, Callable[[int, Size, Size], Size]] = {
    "all_reduce": lambda n, read, written: 2 * read * (n - 1) / n,
    "all_gather_into_tensor": lambda n, read, written: read * (n - 1),
    "reduce_scatter_tensor": lambda n, read, written: read * (n - 1) / n,
    "all_to_all_single": lambda n, read, written: read * (n - 1) / n,
    "broadcast": lambda n, read, written: read,
}
_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd")


def is_collective(node: Node) -> bool:
    """Whether a call sends data to other devices, or waits for it."""
    return getattr(node.target, "namespace", "") in _COLLECTIVES


def is_attention(node: Node) -> bool:
    """Whether a call is a fused attention forward."""
    return _ATTENTION.get(getattr(node.target, "_opname", "")) == 1.0


def numel(value: torch.Tensor) -> Size:
    """The number of elements, as a formula."""
    return _product(tuple(map(symbolic_expression, value.shape)))


@lru_cache(maxsize=4096)
def _product(sizes: tuple[Size, ...]) -> Size:
    found: Size = 1
    for size in sizes:
        found = found * size
    return found if isinstance(found, int) else sympy.expand(found)


def bytes_of(value: Any) -> Size:
    """Bytes of a value's tensors, each by its own shape."""
    found: Size = 0
    for tensor in torch.utils._pytree.tree_leaves(value):
        if isinstance(tensor, torch.Tensor):
            found = found + numel(tensor) * tensor.element_size()
    return found


def cost(node: Node) -> Cost:
    """What one call costs, by the fake values of its arguments and results; views and sizes are free."""
    if node.op != "call_function" or node.target is operator.getitem:
        return FREE
    value = node.meta.get("val")
    tensors = [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]
    if not tensors or _is_view(node):
        return FREE
    name = getattr(node.target, "_opname", "")
    if name == "wait_tensor":
        return FREE
    read: Size = 0
    for source in node.all_input_nodes:
        read = read + bytes_of(source.meta.get("val"))
    written = bytes_of(value)
    narrow = tensors[0].element_size() <= 2
    if is_collective(node):
        return _collective(node, name, read, written)
    op = find(node.target)
    if op is not None and op.cost_rule is not None:
        own = op.cost_rule(*_values(node.args), **_values(node.kwargs))
        return Cost(products=symbolic_expression(own.flops), bytes=symbolic_expression(own.bytes), narrow=narrow)
    if name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "matmul", "linear", "addmv", "mv"):
        return Cost(products=_product_flops(node, tensors[0]), bytes=read + written, narrow=narrow)
    if name in _ATTENTION:
        return Cost(attention=_attention_flops(node, name), bytes=read + written, narrow=narrow)
    formula = _registered(node)
    if formula is not None:
        return Cost(products=formula, bytes=read + written, narrow=narrow)
    known = getattr(node.target, "namespace", "") in ("aten", "prims", "fuseline", "inductor_prims")
    return Cost(bytes=read + written, known=known)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    aliased = [r.alias_info is not None and not r.alias_info.is_write for r in schema.returns]
    return bool(aliased) and all(aliased) or getattr(node.target, "_opname", "") == "_unsafe_view"


def _values(arguments: Any) -> Any:
    return torch.fx.node.map_arg(arguments, lambda n: n.meta.get("val"))


def _product_flops(node: Node, out: torch.Tensor) -> Size:
    """2·(elements of the result)·(length of what is summed over)."""
    given = [a for a in node.args if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)]
    left = given[1 if getattr(node.target, "_opname", "") in ("addmm", "baddbmm", "addmv") else 0]
    return 2 * numel(out) * symbolic_expression(left.meta["val"].shape[-1])


def _attention_flops(node: Node, name: str) -> Size:
    """Two products of [S, T] a head, half of them under a causal mask; five in the backward (Dao, 2023, section 3)."""
    q, k, v = _attended(node)
    heads = _product(tuple(map(symbolic_expression, (*q.shape[:-2], q.shape[-2], k.shape[-2]))))
    if name.startswith(("_flash", "_efficient")):  # [B, S, H, D]
        b, s, h, t = (symbolic_expression(x) for x in (q.shape[0], q.shape[1], q.shape[2], k.shape[1]))
        heads = b * s * h * t
    flops = 2 * heads * (symbolic_expression(q.shape[-1]) + symbolic_expression(v.shape[-1]))
    factor = _ATTENTION[name] * (0.5 if arguments(node).get("is_causal") else 1.0)
    return flops * sympy.Rational(factor) if factor != 1.0 else flops


def _attended(node: Node) -> list[torch.Tensor]:
    """Queries, keys and values of a fused attention, forward or backward."""
    given = arguments(node)
    offset = 1 if "grad_out" in given or "grad_out_" in given else 0
    return [a.meta["val"] for a in list(given.values())[offset : offset + 3]]


def workspace(node: Node) -> Size:
    """Bytes that a call has for itself while it runs, beside its results.

    Flash attention sums the gradient of the queries in float32, and where key heads are shared it makes their
    gradients for each query head first (Dao's `mha_bwd`); cuDNN's was measured to take as much. Ops of the dialect
    have rules of their own.
    """
    op = find(node.target)
    if op is not None and op.workspace_rule is not None:
        return symbolic_expression(op.workspace_rule(*_values(node.args), **_values(node.kwargs)))
    if getattr(node.target, "_opname", "") not in _WITH_WORKSPACE:
        return 0
    q, k, v = _attended(node)
    size = numel(q) * 4
    if not isinstance(q.shape[1], int) or q.shape[1] != k.shape[1]:
        expanded = _product(tuple(map(symbolic_expression, (q.shape[0], q.shape[1], k.shape[2]))))
        widths = symbolic_expression(k.shape[3]) + symbolic_expression(v.shape[3])
        size = size + expanded * widths * k.element_size()
    return size


def _collective(node: Node, name: str, read: Size, written: Size) -> Cost:
    """Bytes that one device sends, for the algorithms that send least (Thakur et al., 2005)."""
    formula = _SENT.get(name)
    if formula is None:
        return Cost(bytes=read + written, link=read, peers=2, known=False)
    peers = group_size(arguments(node).get("group_name"))
    if peers <= 1:
        return Cost(bytes=read + written)
    sent = formula(peers, sympy.Integer(read) if isinstance(read, int) else read, written)
    return Cost(bytes=read + written, link=sent, peers=peers)


def _registered(node: Node) -> Size | None:
    """PyTorch's own table of FLOP formulas, where users register theirs."""
    from torch.utils.flop_counter import flop_registry

    packet = getattr(node.target, "_overloadpacket", None)
    formula = flop_registry.get(packet)
    if formula is None:
        return None
    try:
        found = formula(*_values(node.args), **_values(node.kwargs), out_val=node.meta.get("val"))
    except Exception:  # a formula of somebody's that does not take these arguments is no formula
        return None
    return symbolic_expression(found)
