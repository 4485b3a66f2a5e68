"""Which operands of an op carry a change of basis to its result.

A basis is an orthogonal matrix on blocks of channels of a value's last dimension: x = [x₁ … x_k] becomes
[x₁·R … x_k·R]. An op *carries* it where op(x·R) = op(x)·R, whatever R: it is linear in these operands and treats all
channels alike, or only moves blocks as a whole. One function an op says for which operands that holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ...compiler.ops import attention
from ...compiler.order import touches_written
from ..raising.nodes import op_name, same_size

Carriers = tuple[Node, ...]
_KEEPS_WEIGHTS = ("to", "type_as", "dropout", "view", "reshape", "expand", "slice", "contiguous", "masked_fill", "mul")
"""What may stand between a softmax and its product with the values."""


def carriers(node: Node, block: int) -> Carriers | None:
    """The operands of a call that carry a basis of `block` channels to its result; None where the op carries none.

    An empty tuple stands for a value that is the same in every basis: zeros. What is carried lies in no memory that is
    written to; what else the call reads may, so that the call has to stay where it is.
    """
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    handler = _item if node.target is operator.getitem else _HANDLERS.get(op_name(node))
    if handler is None or node.meta.get("written") or not in_blocks(node, block):
        return None
    found = handler(node, block)
    carried = found is not None and all(in_blocks(n, block) and not n.meta.get("written") for n in found)
    return found if carried else None


def in_blocks(node: Any, block: int) -> bool:
    """Whether a node is a floating-point tensor whose last dimension is a number of such blocks."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.dim():
        return False
    width = value.shape[-1]
    return isinstance(width, int) and width % block == 0


def is_attention(node: Node) -> bool:
    """An attention, of this dialect or PyTorch's own: args are queries, keys, values."""
    return node.target in (attention.overload, torch.ops.aten.scaled_dot_product_attention.default)


def values_of(node: Node) -> Node | None:
    """What an attention mixes the rows of: its values; also where it is written out, as a product of a softmax."""
    if is_attention(node):
        return node.args[2]  # type: ignore[return-value]
    if op_name(node) not in ("matmul", "bmm") or _mixed(node, 1) is None:
        return None
    weights: Any = node.args[0]
    while op_name(weights) in _KEEPS_WEIGHTS:
        weights = weights.args[0]
    return node.args[1] if op_name(weights) in ("softmax", "_softmax") else None  # type: ignore[return-value]


def _value(node: Any) -> torch.Tensor:
    return node.meta["val"]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor)


def _one_for_all_channels(x: Any) -> bool:
    """A number, or a tensor that has one element for all channels."""
    if not isinstance(x, Node):
        return isinstance(x, (int, float))
    value = x.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True  # a symbolic size
    return value.dim() == 0 or same_size(value.shape[-1], 1)


def _dim(node: Node, dim: Any) -> int:
    return int(dim) % _value(node).dim()


def _is_last(node: Node, dim: Any) -> bool:
    return _dim(node, dim) == _value(node).dim() - 1


def _sum(node: Node, block: int) -> Carriers | None:
    a, b = node.args[:2]
    alike = _is_tensor(a) and _is_tensor(b) and all(
        same_size(_value(x).shape[-1], _value(node).shape[-1]) if _value(x).dim() else False for x in (a, b)
    )  # fmt: skip
    return (a, b) if alike else None  # type: ignore[return-value]


def _product(node: Node, block: int) -> Carriers | None:
    a, b = node.args[:2]
    if _is_tensor(a) and _one_for_all_channels(b) and not _one_for_all_channels(a):
        return (a,)  # type: ignore[return-value]
    return (b,) if _is_tensor(b) and _one_for_all_channels(a) and not _one_for_all_channels(b) else None  # type: ignore[return-value]


def _quotient(node: Node, block: int) -> Carriers | None:
    a, b = node.args[:2]
    return (a,) if _is_tensor(a) and _one_for_all_channels(b) and len(node.args) == 2 and not node.kwargs else None  # type: ignore[return-value]


def _first(node: Node, block: int) -> Carriers | None:
    return (node.args[0],) if _is_tensor(node.args[0]) else None  # type: ignore[return-value]


def _cast(node: Node, block: int) -> Carriers | None:
    source = node.args[0]
    return (source,) if _is_tensor(source) and _value(source).is_floating_point() else None  # type: ignore[return-value]


def _dropout(node: Node, block: int) -> Carriers | None:
    _, p, train = (*node.args, None, None)[:3]
    return _first(node, block) if p == 0.0 or train is False else None


def _keeps_last(position: int) -> Callable[[Node, int], Carriers | None]:
    """An op along one dimension, the argument at `position`, which may not be that of the channels."""

    def carried(node: Node, block: int) -> Carriers | None:
        x, dim = node.args[0], (*node.args, *[0] * position)[position]
        return None if not _is_tensor(x) or _is_last(x, dim) else (x,)  # type: ignore[return-value, arg-type]

    return carried


def _transpose(node: Node, block: int) -> Carriers | None:
    x, *dims = node.args
    return None if any(_is_last(x, d) for d in dims) else (x,)  # type: ignore[arg-type, return-value]


def _item(node: Node, block: int) -> Carriers | None:
    """An item of a split, along a dimension that is not that of the channels."""
    split: Any = node.args[0]
    if op_name(split) not in ("split", "split_with_sizes", "chunk", "unbind") or touches_written(split):
        return None
    x, *rest = split.args
    dim = split.kwargs.get("dim", rest[-1] if len(rest) == (1 if op_name(split) == "unbind" else 2) else 0)
    return None if _is_last(x, dim) else (x,)


def _permute(node: Node, block: int) -> Carriers | None:
    x, dims = node.args
    return (x,) if _is_last(x, dims[-1]) else None  # type: ignore[arg-type, index, return-value]


def _unsqueeze(node: Node, block: int) -> Carriers | None:
    x, dim = node.args
    return None if _is_last(node, dim) else (x,)  # type: ignore[return-value]


def _expand(node: Node, block: int) -> Carriers | None:
    x = node.args[0]
    return (x,) if same_size(_value(x).shape[-1], _value(node).shape[-1]) else None  # type: ignore[return-value]


def _repeated(node: Node, block: int) -> Carriers | None:
    x, times = node.args
    return (x,) if times[-1] == 1 else None  # type: ignore[index, return-value]


def _slice(node: Node, block: int) -> Carriers | None:
    given: list[Any] = [*node.args, *[0, None, None, 1][len(node.args) - 1 :]]
    x, dim, start, _, step = given
    if not _is_last(x, dim):  # type: ignore[arg-type]
        return (x,)  # type: ignore[return-value]
    ends = (start or 0, _value(node).shape[-1])
    return (x,) if step == 1 and all(isinstance(e, int) and e % block == 0 for e in ends) else None  # type: ignore[return-value]


def _index(node: Node, block: int) -> Carriers | None:
    x, indices = node.args[:2]
    return (x,) if _leaves_channels(x, indices) else None  # type: ignore[return-value]


def _leaves_channels(x: Any, indices: Any) -> bool:
    """Whether indices take the last dimension as a whole. A mask takes as many dimensions as it has."""
    masks = (torch.bool, torch.uint8)
    taken = sum(_value(i).dim() if _is_tensor(i) and _value(i).dtype in masks else 1 for i in indices)
    return taken < _value(x).dim() or indices[-1] is None


def _joined(node: Node, block: int) -> Carriers | None:
    tensors, dim = (*node.args, 0)[:2]
    new = op_name(node) == "stack"
    return None if _is_last(node, dim) and new else tuple(tensors)  # type: ignore[arg-type]


def _indexed_sum(node: Node, block: int) -> Carriers | None:
    x, dim, _, source = node.args[:4]
    return None if _is_last(x, dim) else (x, source)  # type: ignore[arg-type, return-value]


def _put(node: Node, block: int) -> Carriers | None:
    x, indices, values = node.args[:3]
    return (x, values) if _leaves_channels(x, indices) and in_blocks(values, block) else None  # type: ignore[return-value]


def _reduced(node: Node, block: int) -> Carriers | None:
    x, dims = node.args[:2]
    dims = [dims] if isinstance(dims, int) else dims
    return (x,) if dims and not any(_is_last(x, d) for d in dims) else None  # type: ignore[arg-type, union-attr, return-value]


def _masked(node: Node, block: int) -> Carriers | None:
    x, mask, filler = node.args[:3]
    return (x,) if filler == 0 and _one_for_all_channels(mask) else None  # type: ignore[return-value]


def _chosen(node: Node, block: int) -> Carriers | None:
    condition, *values = node.args[:3]
    if not _one_for_all_channels(condition):
        return None
    tensors = tuple(v for v in values if _is_tensor(v) and not _is_zero(v))
    return tensors if all(_is_tensor(v) or v == 0 for v in values) else None  # type: ignore[return-value]


def _is_zero(x: Any) -> bool:
    return op_name(x) in ("zeros", "zeros_like", "new_zeros")


def _zero(node: Node, block: int) -> Carriers | None:
    return ()


def _attended(node: Node, block: int) -> Carriers | None:
    """Attention mixes tokens, and leaves the channels of the values as they are."""
    return (node.args[2],)  # type: ignore[return-value]


def _mixed(node: Node, block: int) -> Carriers | None:
    """a @ b, of activations both: what mixes the rows of b leaves its channels as they are."""
    a, b = node.args[:2]
    if not (_is_tensor(a) and _is_tensor(b)) or any("weight" in n.meta for n in (a, b)):  # type: ignore[union-attr]
        return None
    return (b,) if _value(b).dim() > 1 else None  # type: ignore[return-value]


_HANDLERS: dict[str, Callable[[Node, int], Carriers | None]] = {
    **dict.fromkeys(("add", "sub"), _sum),
    "mul": _product,
    "div": _quotient,
    **dict.fromkeys(("neg", "clone", "contiguous", "detach", "alias", "_unsafe_view", "view", "reshape"), _first),
    **dict.fromkeys(("flatten", "unflatten", "squeeze"), _first),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "dropout": _dropout,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "repeat": _repeated,
    "slice": _slice,
    **dict.fromkeys(("select", "index_select", "narrow"), _keeps_last(1)),
    "repeat_interleave": _keeps_last(2),
    "index": _index,
    **dict.fromkeys(("cat", "stack"), _joined),
    "index_add": _indexed_sum,
    "index_put": _put,
    **dict.fromkeys(("sum", "mean", "cumsum"), _reduced),
    "masked_fill": _masked,
    "where": _chosen,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _zero),
    **dict.fromkeys(("matmul", "bmm"), _mixed),
    attention.overload._opname: _attended,
    "scaled_dot_product_attention": _attended,
}
