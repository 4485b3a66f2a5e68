"""Passes that go wrong, each in its own way, for the tests of `reduce` and `repro`; a fresh process reads them too."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import torch

import fuseline
from fuseline import Pass, Rule
from fuseline.codegen.expressions import RULES
from fuseline.compiler.ops import Kind, op

aten = torch.ops.aten


class OffByAPercent(Rule):
    """silu(x) → silu(x), times 1.01 where the rule's `wrong` says so."""

    def __init__(self, at: int = -1):
        self.at, self.count = at, -1

    def before(self, x):
        from fuseline.compiler.pattern import call

        return call("silu", x)

    def after(self, m, new):
        self.count += 1
        silu = new(aten.silu.default, m.x)
        return silu if self.at not in (-1, self.count) else new(aten.mul.Tensor, silu, 1.01)


@fuseline.register
@dataclass(frozen=True)
class WrongScale(Pass):
    """Multiplies silu's result by 1.01: everywhere, or at one site of many."""

    name = "wrong-scale"
    at: int = -1

    def rules(self, program):
        yield OffByAPercent(self.at)


@fuseline.register
@dataclass(frozen=True)
class DroppedResidual(Pass):
    """Takes the second operand for a sum, where the first is such a sum itself."""

    name = "dropped-residual"

    def run(self, program, rewriter):
        for node in list(program.graph.nodes):
            if node.target is aten.add.Tensor and getattr(node.args[0], "target", None) is aten.add.Tensor:
                rewriter.rewrite(node, [node], lambda new, node=node: node.args[1], "residual")


@fuseline.register
@dataclass(frozen=True)
class Crash(Pass):
    """Fails while it rewrites a softmax or an attention, or while it looks for one."""

    name = "crash"
    inside: bool = True

    def run(self, program, rewriter):
        for node in list(program.graph.nodes):
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            if not self.inside:
                raise KeyError(node.name)

            def build(new, node=node):
                raise ValueError(f"no head size for {node.args[0].meta['val'].shape[-1]} channels")

            rewriter.rewrite(node, [node], build, "attention")


@fuseline.register
@dataclass(frozen=True)
class WrongMeta(Pass):
    """Leaves a node that says it is in half precision, and is not."""

    name = "wrong-meta"

    def run(self, program, rewriter):
        for node in list(program.graph.nodes):
            if node.target is aten.silu.default:

                def build(new, node=node):
                    half = new(aten.mul.Tensor, new(aten.silu.default, node.args[0]), 0.5)
                    half.meta["val"] = half.meta["val"].half()
                    double = new(aten.mul.Tensor, half, 2)
                    double.meta["val"] = node.meta["val"]
                    return double

                rewriter.rewrite(node, [node], build, "halves")


@fuseline.register
@dataclass(frozen=True)
class WrongAtOneSize(Pass):
    """Right at the size of the capture alone."""

    name = "wrong-at-one-size"
    rows: int = 4

    def run(self, program, rewriter):
        for node in list(program.graph.nodes):
            if node.target is aten.silu.default:

                def build(new, node=node):
                    silu = new(aten.silu.default, node.args[0])
                    share = new(aten.div.Tensor, new(aten.full.default, [], float(self.rows)), rows(new, silu))
                    return new(aten.mul.Tensor, silu, share)

                rewriter.rewrite(node, [node], build, "rows")


def rows(new, node):
    """The number of a tensor's rows, all dimensions but the last."""
    return new(aten.sym_size.int, node, node.meta["val"].dim() - 2)


@fuseline.register
@dataclass(frozen=True)
class Endless(Pass):
    """Rewrites what it made, for ever."""

    name = "endless"

    def run(self, program, rewriter):
        for _ in itertools.count():
            node = next((n for n in program.graph.nodes if n.target is aten.silu.default), None)
            if node is None:
                return
            rewriter.rewrite(node, [node], lambda new, node=node: new(node.target, *node.args), "again")
            time.sleep(0.001)


CALLS = itertools.count()


@fuseline.register
@dataclass(frozen=True)
class AtTimes(Pass):
    """Wrong at every third run."""

    name = "at-times"

    def run(self, program, rewriter):
        wrong = next(CALLS) % 3 == 2
        for node in list(program.graph.nodes):
            if node.target is aten.silu.default:
                factor = 1.5 if wrong else 1

                def build(new, node=node, factor=factor):
                    return new(aten.mul.Tensor, new(aten.silu.default, node.args[0]), factor)

                rewriter.rewrite(node, [node], build, "times")


@fuseline.register
@dataclass(frozen=True)
class CrashAtAdd(Pass):
    """Rewrites the first sum, and fails at the second."""

    name = "crash-at-add"

    def run(self, program, rewriter):
        first, second, *_ = [n for n in program.graph.nodes if getattr(n.target, "_opname", "") in ("add", "linear")]
        rewriter.rewrite(first, [first], lambda new: new(first.target, *first.args), "first")

        def build(new):
            raise LookupError("no such sum")

        rewriter.rewrite(second, [second], build, "second")


@fuseline.register
@dataclass(frozen=True)
class HalfSeen(Pass):
    """Fails where some node is said to be in half precision."""

    name = "half-seen"

    def run(self, program, rewriter):
        for node in program.graph.nodes:
            if getattr(node.meta.get("val"), "dtype", None) is torch.float16:
                raise TypeError("half precision is not for this pass")


@op("faulty_silu(Tensor x) -> Tensor", kind=Kind.POINTWISE)
def faulty_silu(x):
    """silu, whose kernel calls what Triton does not have."""
    return torch.nn.functional.silu(x)


RULES[faulty_silu.overload] = lambda call: f"tl.no_such_function({call.operand('x')})"


@op("unwritable_silu(Tensor x) -> Tensor", kind=Kind.POINTWISE)
def unwritable_silu(x):
    """silu, for which no code can be generated."""
    return torch.nn.functional.silu(x)


def _unwritable(call):
    raise LookupError("no expression for this op")


RULES[unwritable_silu.overload] = _unwritable


@fuseline.register
@dataclass(frozen=True)
class WrongKernel(Pass):
    """Right, and its op's kernel does not compile, or cannot even be written."""

    name = "wrong-kernel"
    written: bool = True

    def run(self, program, rewriter):
        op = faulty_silu if self.written else unwritable_silu
        for node in list(program.graph.nodes):
            if node.target is aten.silu.default:
                rewriter.rewrite(node, [node], lambda new, node=node: new(op, node.args[0]), "kernel")
