"""(x − mean)·rsqrt(var + ε)·w + b, written out or as `aten.layer_norm` → `fuseline.layer_norm`.

    d = x - x.mean(-1, keepdim)                              y = layer_norm(x, w, b, ε)
    y = d / torch.sqrt(d.pow(2).mean(-1, keepdim) + ε) * w + b

The variance must be the biased one, as in Ba et al., 2016, "Layer Normalization".
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from ...compiler.ops import layer_norm
from ...compiler.pattern import Either, Match, Term, Var, call, rsqrt, square
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.rule import Rule
from ...compiler.traits import arguments
from .nodes import is_last, is_vector, only_user, op_name, value


class LayerNorm(Rule):
    def before(self, x: Var, eps: Var, dims: Var, var_dims: Var) -> Term:  # type: ignore[override]
        centred = call("sub", x, call("mean", x, dim=dims, keepdim=True))
        variance = Either(
            (
                call("mean", square(centred), dim=var_dims, keepdim=True, bind="variance"),
                call("var", x, dim=var_dims, keepdim=True, bind="variance"),
            )
        )
        deviation = call("std", x, dim=var_dims, keepdim=True, bind="variance")
        power = Either((variance + eps, variance))
        root = Either((call("sqrt", power), call("pow", power, 0.5), deviation + eps, deviation))
        return Either((centred * rsqrt(power), call("div", centred, root)))

    def matches(self, program: Program) -> Iterator[Match]:
        for core in super().matches(program):
            root, weight, bias, nodes = _grown(core.root)
            bindings = {**core.bindings, "w": weight, "b": bias}
            yield Match(root, bindings, (*core.nodes, *nodes))

    def refuse(self, m: Match) -> str | None:
        rank, eps = value(m.x).dim(), m.get("eps", 0.0)
        for name, dims in (("mean", m.dims), ("variance", m.var_dims)):
            if not is_last(dims, rank):
                return f"the {name} runs over the dimensions {dims} of {rank}, not over the last one"
        if isinstance(eps, Node):
            return f"ε is the tensor '{eps.name}', not a number"
        kind = op_name(m.variance)
        if kind in ("var", "std") and _correction(m.variance) != 0:
            return f"the variance is the unbiased one, divided by n − {_correction(m.variance)}"
        if kind == "std" and eps:
            return "ε is added to the standard deviation, not to the variance"
        return None

    def after(self, m: Match, new: Builder) -> Node:
        return new(layer_norm, m.x, m.w, m.b, float(m.get("eps", 0.0)))


class LayerNormCall(Rule):
    """`aten.layer_norm`."""

    @property
    def name(self) -> str:
        return "LayerNorm"

    def before(self, x: Var, dims: Var, w: Var, b: Var, eps: Var) -> Term:  # type: ignore[override]
        return call("layer_norm", x, dims, w, b, eps)

    def refuse(self, m: Match) -> str | None:
        if len(m.dims) != 1:
            return f"it normalises over the last {len(m.dims)} dimensions, not over the last one"
        return None

    def after(self, m: Match, new: Builder) -> Node:
        return new(layer_norm, m.x, m.w, m.b, float(m.eps))


def _correction(variance: Node) -> float:
    """What is taken from n in the divisor."""
    given = arguments(variance)
    if "unbiased" in given:
        return int(given["unbiased"])
    return 1 if given.get("correction") is None else given["correction"]


def _grown(core: Node) -> tuple[Node, Node | None, Node | None, list[Node]]:
    """The norm with the weight and the bias that follow, where these have its type: root, w, b, nodes."""
    root, weight, bias, nodes = core, None, None, []
    product = only_user(root, "mul")
    if product is not None and (factor := _vector(product, root)) is not None:
        root, weight = product, factor
        nodes.append(product)
    total = only_user(root, "add")
    if total is not None and total.kwargs.get("alpha", 1) == 1 and (term := _vector(total, root)) is not None:
        root, bias = total, term
        nodes.append(total)
    return root, weight, bias, nodes


def _vector(node: Node, norm: Node) -> Node | None:
    """The operand beside the norm, where it is a vector over its last dimension, of its type."""
    a, b = node.args
    other = b if a is norm else a
    fits = is_vector(other, value(norm).shape[-1]) and value(other).dtype == value(norm).dtype  # type: ignore[arg-type]
    return other if fits else None  # type: ignore[return-value]
