"""A corpus of planted faults: rewrites that are wrong, each in its own way, hidden among hundreds that are right.

    planted{fault=dropped-residual,layer=17}

Every rule here is one that somebody could write. The pass re-writes each product, sum and linear of a model into an
equal one, and somewhere in the middle applies one faulty rule once.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import fuseline
from fuseline import Pass, Rule
from fuseline.compiler.expressions import Concat, Param, Scale, Slice, Transpose
from fuseline.compiler.pattern import Match, Var, call
from fuseline.compiler.provenance import module_path

aten = torch.ops.aten


class Commuted(Rule):
    """b·a for a·b: right."""

    def before(self, a, b):
        return a * b

    def refuse(self, m):
        tensors = all(isinstance(x, torch.fx.Node) and isinstance(x.meta["val"], torch.Tensor) for x in (m.a, m.b))
        return None if tensors else "a factor is no tensor"

    def after(self, m, new):
        return new(aten.mul.Tensor, *reversed(m.root.args))


class Subtracted(Rule):
    """a − (−b) for a + b: right, to the bit."""

    def before(self, a, b):
        return call("add", Var("a"), Var("b"))

    def refuse(self, m):
        tensors = all(isinstance(x, torch.fx.Node) and isinstance(x.meta["val"], torch.Tensor) for x in (m.a, m.b))
        return None if tensors and m.b.meta["val"].is_floating_point() else "it adds a number"

    def after(self, m, new):
        return new(aten.sub.Tensor, m.a, new(aten.neg.default, m.b))


class Linear(Rule):
    """linear with its absent bias spelled out: right."""

    def before(self, x, w):
        return call("linear", x, w)

    def after(self, m, new):
        return new(aten.linear.default, m.x, m.w, m.root.args[2] if len(m.root.args) > 2 else None)


class Fault(Rule):
    """A faulty rule: it applies once, in the layer that it is told."""

    name = ""
    module = ""  # what the module's path ends in

    def __init__(self, layer: int):
        self.layer = layer

    def matches(self, program) -> Iterator[Match]:
        found = super().matches(program)
        yield from [m for m in found if self._is_here(m.root)][:1]

    def _is_here(self, node) -> bool:
        path = module_path(node)
        return f"layers.{self.layer}." in f"{path}." and path.endswith(self.module)


class DroppedResidual(Fault):
    """The sum around a block, without what goes past the block."""

    name = "dropped-residual"

    def before(self, x, y, w):
        return call("add", Var("x"), call("linear", y, w, bind="block"))

    def after(self, m, new):
        return m.block


class WrongFoldOrder(Fault):
    """Channels of x are rolled and the weight's columns with them, its two halves joined in the wrong order."""

    name = "wrong-fold-order"
    module = "o_proj"
    shift = 7

    def before(self, x, w):
        return call("linear", x, w)

    def after(self, m, new):
        width, by = m.x.meta["val"].shape[-1], self.shift
        rolled = new(aten.roll.default, m.x, [by], [-1])
        weight = m.w.meta["weight"]
        head, tail = Slice(weight, 1, 0, width - by), Slice(weight, 1, width - by, width)
        return new(aten.linear.default, rolled, new.weight(Concat((head, tail), 1)))  # right: tail, then head


class WrongTranspose(Fault):
    """A square weight, transposed once too often."""

    name = "wrong-transpose"
    module = "o_proj"

    def before(self, x, w):
        return call("linear", x, w)

    def after(self, m, new):
        return new(aten.linear.default, m.x, new.weight(Transpose(m.w.meta["weight"], 0, 1)))


class WrongScaleAxis(Fault):
    """A norm's scale is folded into the weight behind it, along the outputs instead of the inputs."""

    name = "wrong-scale-axis"
    module = "q_proj"

    def before(self, x, scale, w):
        return call("linear", x * scale, w)

    def refuse(self, m):
        return None if isinstance(m.scale.meta.get("weight"), Param) else "the factor is no parameter"

    def after(self, m, new):
        return new(aten.linear.default, m.x, new.weight(Scale(m.w.meta["weight"], m.scale.meta["weight"], 0)))


class OffByOneSlice(Fault):
    """The second half of the channels, begun one too early."""

    name = "off-by-one-slice"

    def before(self, x):
        return call("neg", call("slice", x, Var("dim"), Var("start"), Var("end"), bind="half"))

    def after(self, m, new):
        size = m.x.meta["val"].shape[-1]
        half = new(aten.slice.Tensor, m.x, m.dim, m.start - 1, size - 1)
        return new(aten.neg.default, half)


class StaleMetadata(Fault):
    """A cast to float64 and back that leaves its fake value as it was."""

    name = "stale-metadata"
    module = "mlp.down_proj"

    def before(self, x, w):
        return call("linear", x, w)

    def after(self, m, new):
        wide = new(aten.to.dtype, new(aten.linear.default, m.x, m.w), torch.float64)
        narrow = new(aten.to.dtype, wide, torch.float32)
        wide.meta["val"] = m.root.meta["val"]
        return narrow


class LostAlias(Fault):
    """A view of an input is made contiguous by a copy, though the graph writes through it."""

    name = "lost-alias"

    def matches(self, program) -> Iterator[Match]:
        written = [n.args[0] for n in program.graph.nodes if n.target is aten.copy_.default]
        yield from (Match(n, {}, (n,)) for n in written[:1] if n.op == "call_function")

    def after(self, m, new):
        return new(aten.clone.default, new(m.root.target, *m.root.args))


class WrongDtype(Fault):
    """silu in bfloat16."""

    name = "wrong-dtype"

    def before(self, x):
        return call("silu", x)

    def after(self, m, new):
        return new(aten.to.dtype, new(aten.silu.default, new(aten.to.dtype, m.x, torch.bfloat16)), torch.float32)


class WrongAtOneShape(Fault):
    """Right for every length but the multiples of 17."""

    name = "wrong-at-one-shape"

    def before(self, x):
        return call("silu", x)

    def after(self, m, new):
        remainder = new(operator.mod, new(aten.sym_size.int, m.x, 1), 17)
        factor = new(torch.sym_min, remainder, 1)
        return new(aten.mul.Tensor, new(aten.silu.default, m.x), factor)


class Nondeterministic(Fault):
    """Right in about half of all compilations."""

    name = "nondeterministic"

    def before(self, x):
        return call("silu", x)

    def after(self, m, new):
        silu = new(aten.silu.default, m.x)
        return new(aten.mul.Tensor, silu, 1.5 if os.urandom(1)[0] % 2 else 1.0)


class Crash(Fault):
    """An attribute that this node does not have."""

    name = "crash"
    module = "mlp.up_proj"

    def before(self, x, w):
        return call("linear", x, w)

    def after(self, m, new):
        return new(aten.linear.default, m.x, m.w, m.root.meta["bias"])


class Stuck(Fault):
    """A loop that waits for what never happens."""

    name = "stuck"

    def before(self, x):
        return call("silu", x)

    def after(self, m, new):
        while not m.root._erased:
            time.sleep(0.01)


class Endless(Fault):
    """A rule that matches what it makes, in a pass that runs it to a fixpoint."""

    name = "endless"

    def before(self, x):
        return call("silu", x)

    def matches(self, program) -> Iterator[Match]:
        while found := list(super().matches(program)):
            yield found[0]

    def after(self, m, new):
        return new(aten.silu.default, m.x)


FAULTS: dict[str, type[Fault]] = {kind.name: kind for kind in Fault.__subclasses__()}


@fuseline.register
@dataclass(frozen=True)
class Planted(Pass):
    """Right rewrites in the hundreds, and one that is wrong."""

    name = "planted"

    fault: str = ""  # one of FAULTS; none when empty
    layer: int = 0

    def rules(self, program):
        yield Commuted()
        yield Linear()
        if self.fault:
            yield FAULTS[self.fault](self.layer)
        yield Subtracted()
