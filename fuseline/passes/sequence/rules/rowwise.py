"""Ops that work element by element, norms, embeddings, and what runs along one dimension and no other."""

from __future__ import annotations

import torch
from torch.fx import Node

from ....compiler.traits import POINTWISE, arguments
from ._define import Dims, Rowwise, aligned, nothing, overloads, rule, same, tensors, value

fuseline = torch.ops.fuseline


@rule(
    torch.Tag.pointwise, *POINTWISE, fuseline.glu.default,
    *overloads("clone.default contiguous.default detach.default alias.default lift_fresh_copy.default "
               "where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor "
               "zeros_like.default ones_like.default full_like.default empty_like.default softplus.default "
               "log_sigmoid.default logaddexp.default sub.Tensor rsub.Scalar type_as.default to.dtype_layout "
               "to.device to.dtype to.other _to_copy.default float_power.Tensor_Scalar pow.Tensor_Tensor "
               "hardtanh.default threshold.default relu6.default elu.default mish.default"),
)  # fmt: skip
def pointwise(node: Node) -> Dims:
    rank = value(node).dim()
    return {n: aligned(n, rank) for n in tensors(node)}


@rule(*overloads("dropout.default native_dropout.default"))
class Dropout(Rowwise):
    """Each rank draws for its own positions; without positions of its own it would draw the same on every rank."""

    def dims(self, node: Node) -> Dims:
        return {n: same(n) for n in tensors(node)}


@rule(*overloads("layer_norm.default rms_norm.default"), fuseline.layer_norm.default, fuseline.rms_norm.default)
def norm(node: Node) -> Dims:
    given = arguments(node)
    x = next(iter(given.values()))
    over = len(given.get("normalized_shape", (1,)))
    return {**{n: nothing(n) for n in tensors(node)}, x: same(x, *range(-over, 0))}


@rule(fuseline.rotary.default)
def rotary(node: Node) -> Dims:
    rank = value(node).dim()
    return {n: [None if d == rank - 1 else d for d in aligned(n, rank)] for n in tensors(node)}


@rule(*overloads("embedding.default"))
def embedding(node: Node) -> Dims:
    given = arguments(node)
    return {given["weight"]: nothing(given["weight"]), given["indices"]: same(given["indices"])}


@rule(*overloads("one_hot.default"))
def one_hot(node: Node) -> Dims:
    return {n: same(n) for n in tensors(node)}


@rule(*overloads(
    "softmax.int log_softmax.int _softmax.default _log_softmax.default flip.default roll.default sort.default "
    "sort.stable argsort.default argsort.stable topk.default cummax.default cumprod.default logcumsumexp.default "
    "renorm.default glu.default"
))  # fmt: skip
def along(node: Node) -> Dims:
    """All dimensions but those that the op names."""
    given = arguments(node)
    named = given.get("dim", given.get("dims", -1))
    x = given["self"]
    return {x: same(x, *(named if isinstance(named, (list, tuple)) else [named]))}
