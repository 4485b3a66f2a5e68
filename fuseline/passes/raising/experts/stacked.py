"""Experts in one tensor: products of rows with the matrices that index each row, or that a grouped product picks.

    batched                                             grouped
    e = indices.reshape(-1)                             e, p = sort(indices.reshape(-1))
    x = hidden.repeat_interleave(K, 0)                  x = hidden[p // K]
    h = bmm(gate_up[e], x[..., None])[..., 0] + b[e]    h = grouped_mm(x, gate_upᵀ, offsets of e) + b[e]
    y = bmm(down[e], glu(h)[..., None])[..., 0]         y = grouped_mm(glu(h), downᵀ, offsets of e)
    out = (y·weights.reshape(-1, 1)).view(T, K, H).sum(1)          the same, after y[inverse of p]

The stacks may be stored transposed, and products may have biases. Rows of experts that do not exist, which some graphs
mask, do not occur: that is proved from where the indices come from, or the site is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..nodes import op_name, same_shape, value
from .gate import Gate, gate_of
from .reading import called, dim_of, flattened, indexed, item, shaped, squeezed, unsqueezed

GROUPED = ("_grouped_mm", "grouped_mm_fallback")


@dataclass
class Found:
    """A layer of experts: nodes as `fuseline::moe` takes them.

    turned: whether the stacks are stored transposed, [E, H, 2I] and [E, I, H]; nodes: all that the layer takes the
    place of; reason: why it may not.
    """

    hidden: Node
    indices: Node
    weights: Node
    gate_up: Node
    down: Node
    gate: Gate
    gate_up_bias: Node | None = None
    down_bias: Node | None = None
    turned: tuple[bool, bool] = (False, False)
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class _Product:
    """rows [S, n] times the matrices of `stack` at `ids` [S]; offsets: of a grouped product."""

    x: Node
    stack: Node
    ids: Node | None
    offsets: Node | None
    turned: bool
    bias: Node | None = None


def stacked(root: Node) -> Found | None:
    """The layer whose result is `root`: the sum over K, or that in another type."""
    total = root
    cast = called(root, "to", "_to_copy")
    if cast is not None:
        total = cast["self"]
    summed = called(total, "sum")
    if summed is None or summed.get("keepdim") or not _is(summed.get("dim"), 1) or not isinstance(summed["self"], Node):
        return None
    terms = called(summed["self"], "view", "reshape", "_unsafe_view", "unflatten")
    if terms is None or value(summed["self"]).dim() != 3:
        return None
    rows, inverse = terms["self"], None
    picked = indexed(rows)
    if picked is not None and len(picked[1]) == 1:
        rows, inverse = picked[0], picked[1][0]
    k = value(summed["self"]).shape[1]
    product = called(rows, "mul")
    if product is None or not isinstance(k, int):
        return None
    for y, w in ((product["self"], product["other"]), (product["other"], product["self"])):
        found = _experts(y, w, inverse, value(summed["self"]).shape[0], k)
        if found is not None:
            same = same_shape(root, found.hidden) and value(root).dtype == value(found.hidden).dtype
            return found if same else None
    return None


def _experts(y: Any, w: Any, inverse: Any, tokens: Any, k: int) -> Found | None:
    scale = unsqueezed(w, 1)
    second = _product(y)
    gate = None if second is None else gate_of(second.x)
    first = None if gate is None else _product(gate.both)
    if scale is None or second is None or gate is None or first is None:
        return None
    if inverse is None:
        parts = _batched(first, second, scale, tokens, k)
    else:
        parts = _grouped(first, second, scale, inverse, tokens, k)
    if parts is None or not shaped(parts[0], tokens, None):
        return None
    hidden, indices, weights = parts
    turned = (first.turned, second.turned)
    return Found(hidden, indices, weights, first.stack, second.stack, gate, first.bias, second.bias, turned)


def _product(node: Any) -> _Product | None:
    """A product of rows, with its bias, behind a mask of rows that do not exist."""
    node, _ = _unmasked(node)
    added = called(node, "add")
    if added is not None and added.get("alpha", 1) == 1:
        for one, other in ((added["self"], added["other"]), (added["other"], added["self"])):
            found, bias = _plain(one), indexed(other)
            if found is not None and bias is not None and len(bias[1]) == 1:
                ids = bias[1][0]
                if found.ids is not None and ids is not found.ids:
                    return None
                return _Product(found.x, found.stack, ids, found.offsets, found.turned, bias[0])
        return None
    return _plain(node)


def _plain(node: Any) -> _Product | None:
    node, _ = _unmasked(node)
    if op_name(node) in GROUPED and not node.meta.get("written"):
        return _by_offsets(node)
    for dim, order in ((2, ("self", "mat2")), (1, ("mat2", "self"))):
        product = squeezed(node, dim)
        found = called(product, "bmm")
        if found is None:
            continue
        matrices, x = indexed(found[order[0]]), unsqueezed(found[order[1]], dim)
        if matrices is None or x is None or len(matrices[1]) != 1 or value(matrices[0]).dim() != 3:
            return None
        return _Product(x, matrices[0], matrices[1][0], None, dim == 1)
    return None


def _by_offsets(node: Node) -> _Product | None:
    x, stack, offsets = (*node.args, *node.kwargs.values())[:3]
    if not isinstance(stack, Node) or not isinstance(x, Node) or not isinstance(offsets, Node):
        return None
    x, _ = _unmasked(x)
    swapped = called(stack, "transpose")
    turned = swapped is None
    if swapped is not None:
        if {dim_of(swapped["dim0"], stack), dim_of(swapped["dim1"], stack)} != {1, 2}:
            return None
        stack = swapped["self"]
    return _Product(x, stack, None, offsets, turned) if value(stack).dim() == 3 else None


def _batched(first: _Product, second: _Product, scale: Node, tokens: Any, k: int) -> tuple[Node, Node, Node] | None:
    ids = first.ids
    repeated = called(first.x, "repeat_interleave")
    if ids is None or ids is not second.ids or repeated is None or repeated.get("repeats") != k:
        return None
    if repeated["dim"] is None or dim_of(repeated["dim"], first.x) != 0:
        return None
    clamped = called(ids, "clamp")
    indices = flattened(ids, tokens, k)
    if clamped is not None:
        indices = flattened(clamped["self"], tokens, k)
        if indices is None or clamped["min"] not in (0, None):
            return None
        if clamped["max"] is not None and clamped["max"] < value(first.stack).shape[0] - 1:
            return None
    weights = flattened(scale, tokens, k)
    return None if indices is None or weights is None else (repeated["self"], indices, weights)


def _grouped(
    first: _Product, second: _Product, scale: Node, inverse: Any, tokens: Any, k: int
) -> tuple[Node, Node, Node] | None:
    offsets = first.offsets
    if offsets is None or offsets is not second.offsets:
        return None
    ids = _counted(offsets, value(first.stack).shape[0])
    taken, picked = indexed(first.x), indexed(scale)
    if ids is None or taken is None or picked is None or len(taken[1]) != 1 or len(picked[1]) != 1:
        return None
    order = picked[1][0]
    ordered = item(order, 1, "sort")
    if ordered is None or item(ids, 0, "sort") is not ordered or not _inverts(inverse, order):
        return None
    if not _divides(taken[1][0], order, k):
        return None
    for product in (first, second):
        if product.bias is not None and not _same_ids(product.ids, ids):
            return None
    given = called(ordered, "sort")
    assert given is not None
    is_rising = not given["descending"] and dim_of(given["dim"], given["self"]) == 0
    indices, weights = flattened(given["self"], tokens, k), flattened(picked[0], tokens, k)
    if not is_rising or indices is None or weights is None:
        return None
    return taken[0], indices, weights


def _counted(offsets: Node, experts: Any) -> Node | None:
    """The sorted ids whose running counts are `offsets`."""
    running = called(offsets, "cumsum")
    counts = None if running is None or dim_of(running["dim"], running["self"]) else called(running["self"], "histc")
    if counts is None or counts["bins"] != experts or (counts["min"], counts["max"]) != (0, experts - 1):
        return None
    ids = counts["self"]
    cast = called(ids, "to", "_to_copy")
    return ids if cast is None else cast["self"]


def _inverts(inverse: Any, order: Node) -> bool:
    """Whether `inverse` is the inverse of a permutation: i[order] = 0, 1, 2, …; or the order of the order."""
    put = called(inverse, "index_put")
    if put is not None:
        counting = called(put["values"], "arange")
        whole = counting is not None and counting.get("start", 0) == 0 and counting.get("step", 1) == 1
        return whole and list(put["indices"]) == [order] and not put["accumulate"] and same_shape(put["values"], order)
    found = called(inverse, "argsort")
    return found is not None and found["self"] is order and not found["descending"]


def _divides(tokens: Any, order: Node, k: int) -> bool:
    found = called(tokens, "floor_divide", "div")
    return (
        found is not None
        and found["self"] is order
        and found["other"] == k
        and (op_name(tokens) == "floor_divide" or found.get("rounding_mode") == "floor")
    )


def _same_ids(ids: Node | None, wanted: Node) -> bool:
    found = called(ids, "clamp", "clamp_max")
    return ids is wanted or (found is not None and found["self"] is wanted and found.get("min") in (None, 0))


def _unmasked(node: Any) -> tuple[Any, bool]:
    """The value behind masks that put zeros where an expert does not exist: `ids >= E`."""
    masked = called(node, "masked_fill")
    if masked is None or masked["value"] != 0:
        return node, False
    mask = unsqueezed(masked["mask"], 1)
    beyond = called(mask, "ge")
    return (node, False) if beyond is None or not isinstance(beyond["other"], int) else (masked["self"], True)


def _is(dims: Any, wanted: int) -> bool:
    return dims == wanted or list(dims if isinstance(dims, (list, tuple)) else ()) == [wanted]
