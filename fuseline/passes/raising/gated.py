"""activation(gate)·up → `fuseline.glu`: SwiGLU, GEGLU, ReGLU, GLU.

    y = F.silu(linear(x, Wg)) * linear(x, Wu)         y = glu(linear(x, Wg), linear(x, Wu), "silu")

Gate and up may come from two linears or be parts of one. Source: Shazeer, 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ...compiler.ops import glu
from ...compiler.pattern import Either, Match, Term, Var, call, same_value
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.rule import Rule
from .nodes import same_shape

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


class Gated(Rule):
    """act(gate)·up; a subclass says which activation."""

    activations: tuple[str, ...] = ()

    def spelled(self, activation: str, x: Var) -> Term:
        raise NotImplementedError

    def matches(self, program: Program) -> Iterator[Match]:
        for activation in self.activations:
            term = self.spelled(activation, Var("gate")) * Var("up")
            for m in self.find_all(program, term):
                if _gates(m.gate, m.up):
                    m.bindings["activation"] = activation
                    yield m

    def after(self, m: Match, new: Builder) -> Node:
        return new(glu, m.gate, m.up, m.activation)


class SwiGLU(Gated):
    activations = ("silu",)

    def spelled(self, activation: str, x: Var) -> Term:
        return Either((call("silu", x), x * call("sigmoid", x)))


class GEGLU(Gated):
    activations = ("gelu", "gelu_tanh")

    def spelled(self, activation: str, x: Var) -> Term:
        if activation == "gelu":
            erf = Either((call("erf", call("div", x, math.sqrt(2))), call("erf", x * (1 / math.sqrt(2)))))
            return Either((call("gelu", x, approximate="none"), *_halved(x, erf)))
        cube = Either((call("pow", x, 3), x * x * x))
        tanh = call("tanh", (x + cube * 0.044715) * SQRT_2_OVER_PI)
        return Either((call("gelu", x, approximate="tanh"), *_halved(x, tanh)))


class ReGLU(Gated):
    activations = ("relu",)

    def spelled(self, activation: str, x: Var) -> Term:
        return call("relu", x)


class GLU(Gated):
    activations = ("sigmoid",)

    def spelled(self, activation: str, x: Var) -> Term:
        return call("sigmoid", x)


def _gates(gate: Any, up: Any) -> bool:
    """Whether two tensors of one shape meet; x·sigmoid(x) is an activation, a product with a scalar no gating."""
    tensors = all(isinstance(n, Node) and isinstance(n.meta.get("val"), torch.Tensor) for n in (gate, up))
    return tensors and same_shape(gate, up) and not same_value(gate, up)


def _halved(x: Var, inner: Term) -> tuple[Term, ...]:
    """½·x·(1 + inner), associated either way."""
    return (x * 0.5) * (inner + 1), x * ((inner + 1) * 0.5), (x * (inner + 1)) * 0.5
