"""What an op is to fusion: pointwise, a row operation, or a mere rearrangement of elements.

`fuse` grows regions by these traits, and codegen has an emitter for every op that bears one (a test holds both
directions). Dialect ops carry their kind themselves (`fuseline/compiler/ops`); this table classes `aten` overloads.
"""

from __future__ import annotations

from typing import Any

import torch

from .ops import Kind, find


def overloads(names: str) -> frozenset[Any]:
    """`"add.Tensor neg.default"` → those overloads of `torch.ops.aten`."""
    found = set()
    for name in names.split():
        packet, overload = name.split(".")
        found.add(getattr(getattr(torch.ops.aten, packet), overload))
    return frozenset(found)


POINTWISE = overloads("""
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar mul.Tensor mul.Scalar
    div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode floor_divide.default floor_divide.Scalar
    remainder.Tensor remainder.Scalar pow.Tensor_Scalar pow.Scalar addcmul.default square.default
    neg.default abs.default exp.default exp2.default log.default log2.default log1p.default sqrt.default rsqrt.default
    reciprocal.default sin.default cos.default tanh.default erf.default sigmoid.default silu.default gelu.default
    relu.default leaky_relu.default softplus.default floor.default ceil.default trunc.default round.default
    sign.default maximum.default minimum.default clamp.default clamp.Tensor clamp_min.default clamp_max.default
    where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor
    eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar
    ge.Tensor ge.Scalar isnan.default isinf.default
    logical_not.default logical_and.default logical_or.default logical_xor.default
    bitwise_not.default bitwise_and.Tensor bitwise_and.Scalar bitwise_or.Tensor bitwise_or.Scalar
    bitwise_xor.Tensor bitwise_xor.Scalar __and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar
    __xor__.Tensor __xor__.Scalar
    bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor
    bitwise_right_shift.Tensor_Scalar __lshift__.Scalar __rshift__.Scalar
    _to_copy.default to.dtype to.dtype_layout to.device to.other type_as.default
    silu_backward.default sigmoid_backward.default tanh_backward.default threshold_backward.default
""")

#: Reductions, which are row operations where they run over the last dimension alone.
REDUCTIONS = overloads("""
    sum.default sum.dim_IntList mean.default mean.dim amax.default amin.default var.correction var.dim logsumexp.default
    softmax.int _softmax.default log_softmax.int _log_softmax.default _softmax_backward_data.default
""")

#: Normalisations, which are row operations where they run over the last dimension alone.
NORMS = overloads("rms_norm.default layer_norm.default")

#: Ops that compute nothing: each element of the result is one element of an input. The emitter turns them into
#: address arithmetic. The results of `cat`, `clone` and `contiguous` are new storage in PyTorch, not aliases.
REARRANGEMENTS = overloads("""
    view.default _unsafe_view.default reshape.default flatten.using_ints unflatten.int unsqueeze.default
    squeeze.default squeeze.dim squeeze.dims expand.default expand_as.default transpose.int permute.default t.default
    movedim.int slice.Tensor narrow.default select.int chunk.default split.Tensor split_with_sizes.default
    unbind.int repeat_interleave.self_int cat.default stack.default alias.default detach.default clone.default
    contiguous.default
""")

#: Ops that read no tensor's elements.
CREATIONS = overloads("""
    full.default full_like.default zeros.default zeros_like.default ones.default ones_like.default
    scalar_tensor.default arange.default arange.start arange.start_step
""")


def kind(node_or_target: torch.fx.Node | Any) -> Kind | None:
    """How the op may join a fused kernel: POINTWISE, ROW, or a dialect op's own kind; None where it may not.

    A node is judged with its arguments: a reduction is ROW only over the last dimension. A bare overload is judged by
    what it can be. Rearrangements (`is_view`) and creations count as POINTWISE: one element of the result needs at
    most one element of an input.
    """
    node = node_or_target if isinstance(node_or_target, torch.fx.Node) else None
    target = node.target if node is not None else node_or_target
    op = find(target)
    if op is not None:
        return op.kind
    if target in POINTWISE or target in REARRANGEMENTS or target in CREATIONS:
        return Kind.POINTWISE
    if target in REDUCTIONS or target in NORMS:
        return Kind.ROW if node is None or is_last_dim_reduction(node) else None
    return None


def is_view(target: Any) -> bool:
    """Whether the op only moves elements about. It is no statement about aliasing: `cat` is one of them."""
    return target in REARRANGEMENTS


def is_last_dim_reduction(node: torch.fx.Node) -> bool:
    """Whether the node reduces or normalises over the last dimension and no other."""
    if node.target not in REDUCTIONS and node.target not in NORMS:
        return False
    given = arguments(node)
    if "normalized_shape" in given:
        return len(given["normalized_shape"]) == 1
    tensor = next(iter(given.values()))
    rank = tensor.meta["val"].dim()
    dims = given.get("dim")
    if dims is None or dims == []:
        return bool(rank == 1)
    dims = [dims] if isinstance(dims, int) else list(dims)
    return bool(rank >= 1 and len(dims) == 1 and dims[0] % rank == rank - 1)


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of its overload's schema, defaults filled in, in the schema's order.

    Arguments of a target without a schema (arithmetic on sizes) are named by their positions.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def is_transpose(node: torch.fx.Node) -> bool:
    """Whether a node is a tensor with its last two dimensions exchanged, however that is written."""
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor) or fake.dim() < 2:
        return False
    name, rank, rest = getattr(node.target, "_opname", ""), fake.dim(), node.args[1:]
    last = [rank - 1, rank - 2]
    if name in ("t", "numpy_T", "mT", "matrix_H", "adjoint"):
        return not fake.is_complex() and (rank == 2 or name != "numpy_T")
    if name in ("transpose", "swapaxes", "swapdims"):
        return {int(d) % rank for d in rest} == {*last}  # type: ignore[arg-type, call-overload]
    return name == "permute" and [int(d) % rank for d in rest[0]] == [*range(rank - 2), *last]  # type: ignore[union-attr, arg-type]
